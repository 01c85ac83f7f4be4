"""What the committed runs of the full presets taught, in the words of who looked at them."""

LEARNED = {
    "ends": """
For samples it matters, as the article and Lin et al. 2024 (arXiv:2305.08891) say: the Fréchet
distance falls from 9.32 ± 0.13 where alpha(T)^2 is 0.58 to 6.11 ± 0.06 where it is 0.00004, with
the mismatch that the reverse process starts from, 28 nats to 0.001. But once it is below about 0.02
(0.4 nats) nothing more is gained within error: small is enough, it need not go to 0. The likelihood
is best in between, at beta_max 4, where the mismatch can cost 0.07 bits per dimension at most: with
training times uniform in t, a schedule that runs further into noise leaves fewer of its 400 steps
to the data end.
""",
    "prediction": """
What the network predicts decides. With v all nine rows end between 2.85 and 3.05 bits per dimension
and at a Fréchet distance of 5.3 to 6.1. With eps the likelihood follows (2.94 to 3.18), except
under EDM's weighting (4.1 to 5.1), but the samples do not: 9 to 10 with vp, 28 to 37 under EDM's
weighting, and 24 to 43 where the process ends at alpha = 0, since x0 is there what eps leaves,
divided by alpha. With x0 it is the likelihood that fails (7 to 146 bits): towards the data an error
in x0 counts times the SNR. That is why Salimans and Ho 2022 (arXiv:2202.00512) propose v. Of its
weightings min-SNR and EDM's give better samples than `simple` (5.6 and 5.3 for 6.1), as Hang et al.
2023 (arXiv:2303.09556) claim of the first, at bits that cannot be told apart (2.94 and 2.92 for
2.90, over the processes). The process hardly matters to v, but that under these two vp takes 0.1 to
0.2 bits more. With three seeds and 26 comparisons Holm's correction leaves four rows significant in
bits and none in distance; averaged over the others, the gain of v is in both.
""",
    "samplers": """
Few calls tell samplers apart, many do not. At five calls UniPC is at a Fréchet distance of 1.84 ±
0.08, about where all deterministic samplers end (1.78 to 1.82 at 20 calls and more, one flow after
all), while DDIM is at 2.30 ± 0.08 and needs ten to twenty: as Zhao et al. 2023 (arXiv:2302.04867)
and Lu et al. 2022 (arXiv:2211.01095) claim. Given enough steps the noise of `ancestral` is as good
in distance, and its samples read better as their label (0.69 to 0.74 for about 0.61), in keeping
with Karras et al. 2022 (arXiv:2206.00364), for whom noise corrects earlier errors. That fewer steps
read better is no merit: they draw plainer digits. Three seeds leave little of this significant
after Holm's correction.
""",
    "coupling": """
Yes, and here by much: with optimal-transport coupling the velocity varies a hundredth as much along
a path, and two Euler steps do what eight do without (0.071 ± 0.006 and 0.068 ± 0.005), Heun's three
calls what fifteen do. One step is better (0.23 for 0.61) but not good: within batches of 256 the
coupling is near the optimal one, not the same. With many steps both end at the same distance, and
their likelihoods cannot be told apart, so the gain is in calls alone, as Pooladian et al. 2023
(arXiv:2304.14772) and Tong et al. 2024 (arXiv:2302.00482) have it. Its price is an assignment of
256 points to 256 at each step, on the host, where the training FLOPs do not count it.
""",
    "ema": """
Averaging pays where the learning rate does not fall: at a constant rate decay 0.97 brings 2.73 ±
0.06 bits per dimension to 2.51 ± 0.03, as 0.99 does, and 0.9 a Fréchet distance of 3.75 ± 0.11 to
3.52 ± 0.06. Under a cosine decay, whose last steps hardly move, no average beats the last
parameters. That agrees with the view of averaging as a decay of the learning rate in disguise, and
with Karras et al. 2024 (arXiv:2312.02696), who find the best length to differ from case to case. In
a run of 800 steps 0.997 and 0.999, at home in runs of 10^5, still remember the start, and ruin it.
That the constant rate ends ahead of the cosine, in bits once it is averaged, says only that 800
steps are few.
""",
    "losses": """
With the exact score to regress on, 2000 steps leave an eighth of the error that denoising leaves:
the variance of its target is what denoising pays for not knowing the score. Of the losses that need
only data, implicit score matching ends 28% below denoising after as many steps, which survives the
correction, and sliced cannot be told from denoising; but they take 2.1 and 1.6 times the
operations. At about equal operations denoising is far ahead: its 2000 steps take 18% more than 800
implicit ones and leave a sixth of their error. (Both lengths average the parameters with decay
0.998, which lags behind in the shorter.) All this is as Vincent 2011 and Song et al. 2019
(arXiv:1905.07088) have it: one gradient in expectation, with different noise and cost.
""",
    "binding": """
Two things together let it: one attention over text and picture, and no mean of the text beside it.
So told, all three runs obey 93 to 94% of the prompts of two objects, and as many where a colour or
an order was never seen; by cross-attention with the mean, as in the base, 13 to 30%, and 13, 77 and
86% where `binding_data` trains the same again. The mean alone tells which words there are, and
under it the shapes stay mixed up (34 to 66%, for 92 to 95% without). What comes last, and at once,
is which object stands where: runs at 44 to 50% draw both, each in its colour, and mirror every
other picture. When it comes is chance as well: of three runs by cross-attention without the mean
one had it, and of six of the base's three. It came to none of the twelve runs with 64 tokens in
these 5000 steps, though single objects are drawn best by those.
""",
    "binding_data": """
They do, it seems, for where things stand: of nine runs with them (three of `binding` among these)
six came to draw the relation that was asked for, of six that saw two objects alone none, after 1250
steps or 5000. Shapes are learned sooner from two alone, 92% for 39 and 69% after as many steps,
which see twice as many of them. Nothing here survives Holm's correction but that more steps give
better shapes: with three seeds chance decides, since a run either has the relation or has not.
""",
}
