"""What the committed runs of the full presets taught, in the words of who looked at them."""

LEARNED = dict.fromkeys(("prediction", "samplers", "ema", "coupling", "losses", "ends"), "")
