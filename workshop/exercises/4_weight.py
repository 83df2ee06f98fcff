"""Exercise 4: derive the 1/t weight.

A masked-diffusion student is trained like this: draw a level t uniformly from 0 to 1, mask every
token by chance with probability t, and let the student predict the masked ones. A single number
must come out whose average over all levels and masks is worth something: here the negative
log-likelihood of the text, per token, that the student would have if it wrote the tokens one by
one, averaged over all orders of writing.

    nll      (B, T) -log p of the true token at each position, given the tokens that are visible
    masked   (B, T) bool
    t        (B, 1) the level of each row, above 0

Return the loss, one number: a mean over rows and tokens, each prediction with its weight. A hint on
paper: with T = 1 a token is masked in a share t of all draws, and must count 1 on average. Why
is the same weight right for T = 2? Compare the chance that exactly token 2 is visible with the
share of orders in which it comes first.

    python workshop/check.py 4
"""

import numpy as np


def loss(nll, masked, t):
    raise NotImplementedError
