"""Exercise 3: move the bottleneck."""


def move(trajectory, step, other, response, tau):
    def anchors(at):
        # responses only: prompts have no confidence, and would count in the mean
        delta = trajectory[at]["logprob"] - trajectory[0]["logprob"]
        return delta[response] > tau

    now, before = anchors(other), anchors(step)
    return now.mean(), now[before].mean()
