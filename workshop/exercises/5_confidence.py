"""Exercise 5: let the diffusion student use its own confidence.

T3S needs a confidence for every response token. An autoregressive student has one: it reads what
came before. A masked-diffusion student can be asked at any mask, and its answer depends on what
else is hidden. So hide a random part of the response and ask for that; then hide the other part and
ask for that. Every response token has been asked for once. Average over several such draws.

    score(masked)   (B, T) bool -> (B, T): hides these tokens, and gives the negative log-likelihood
                    of what stood there; 0 where nothing is hidden
    response        (B, T) bool: True at response tokens; a prompt is never hidden
    levels          (K, B, 1) of each draw the noise level of each row, 0 to 1
    u               (K, B, T) uniform numbers: in draw k a token is hidden where u is below its level

Return (B, T): the log-probability of each response token, the mean over the K draws; 0 at prompts.

    python workshop/check.py 5
"""

import numpy as np


def own_confidence(score, response, levels, u):
    raise NotImplementedError
