"""Judges of scenes: what is in a picture, and whether it is what the caption asked for.

reading = detector.read(params, images)              # learned: any scene
reading = templates.read(images)                     # by least squares: nothing is learned
shares(obeyed(reading, scenes.factors(indices)))     # {"all": 0.98, "all_stderr": 0.006, ...}
"""

from experiments.latents.judges.obeyed import ceiling, obeyed, shares
from experiments.latents.judges.reading import Reading, of_factors

__all__ = ["Reading", "ceiling", "obeyed", "of_factors", "shares"]
