"""What the committed runs of the full presets taught, in the words of who looked at them."""

LEARNED = dict.fromkeys(("prediction", "samplers", "ema", "coupling"), "") | {
    "ends": """
For samples it matters, as the article and Lin et al. 2024 (arXiv:2305.08891) say: the Fréchet
distance falls from 9.32 ± 0.13 where alpha(T)^2 is 0.58 to 6.11 ± 0.06 where it is 0.00004, with
the mismatch that the reverse process starts from, 28 nats to 0.001. But once it is below about 0.02
(0.4 nats) nothing more is gained within error: small is enough, it need not go to 0. The likelihood
is best in between, at beta_max 4, where the mismatch can cost 0.07 bits per dimension at most: with
training times uniform in t, a schedule that runs further into noise leaves fewer of its 400 steps
to the data end.
""",
    "losses": """
With the exact score to regress on, 2000 steps leave an eighth of the error that denoising leaves:
the variance of its target is what denoising pays for not knowing the score. Of the losses that need
only data, implicit score matching ends 28% below denoising after as many steps, which survives the
correction, and sliced cannot be told from it; but they take 2.1 and 1.6 times the operations, and
in this run 2.9 and 1.9 times the seconds. At equal seconds denoising is far ahead: its 2000 steps
cost as much as 800 implicit ones and leave a sixth of their error. (Both lengths average the
parameters with decay 0.998, which lags behind in the shorter.) All this is as Vincent 2011 and Song
et al. 2019 (arXiv:1905.07088) have it: one gradient in expectation, with different noise and cost.
""",
}
