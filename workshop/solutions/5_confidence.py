"""Exercise 5: let the diffusion student use its own confidence."""


def own_confidence(score, response, levels, u):
    total = 0.0
    for level, noise in zip(levels, u, strict=True):
        hidden = response & (noise < level)
        rest = response & ~hidden
        total = total - score(hidden) - score(rest)
    return total / len(levels)
