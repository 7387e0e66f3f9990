"""The losses once more, as loops over items in float64 NumPy: slow, plain, and independent.

A `Case` is what a loss sees, as sets and lists: the rows of x (the batch, then the references),
each row's set of classes, which rows count, how many rows are anchors, and optionally which pairs
were mined. Every function returns the scalar that the loss's paper (or the issue's table) defines.
"""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Case:
    x: np.ndarray
    sets: list[set[int]]
    keep: list[bool]
    anchors: int
    params: dict = field(default_factory=dict)
    mined_positive: np.ndarray | None = None
    mined_negative: np.ndarray | None = None

    def rows(self):
        return [i for i in range(self.anchors) if self.keep[i]]

    def _pairs(self, i, share, mined):
        if not self.keep[i]:
            return []
        return [
            j
            for j in range(len(self.x))
            if j != i
            and self.keep[j]
            and bool(self.sets[i] & self.sets[j]) == share
            and (mined is None or mined[i, j])
        ]

    def positives(self, i):
        return self._pairs(i, True, self.mined_positive)

    def negatives(self, i):
        return self._pairs(i, False, self.mined_negative)


def unit(v):
    length = math.sqrt(float(v @ v))
    return v / length if length > 0 else v


def dist(a, b, distance="euclidean", normalize=True):
    if normalize:
        a, b = unit(a), unit(b)
    if distance == "euclidean":
        return math.sqrt(float(np.sum((a - b) ** 2)))
    if distance == "sqeuclidean":
        return float(np.sum((a - b) ** 2))
    if distance == "cosine":
        return 1 - float(unit(a) @ unit(b))
    return -float(a @ b)


def cos(a, b):
    return float(unit(a) @ unit(b))


def sim(a, b, distance):
    return cos(a, b) if distance == "cosine" else float(a @ b)


def average(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def nonzero(values):
    return average(v for v in values if v > 0)


def log_sum(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def softplus(v):
    return max(v, 0) + math.log1p(math.exp(-abs(v)))


# --- pairs and triplets ------------------------------------------------------------------------


def triplet(
    c, margin=0.2, mining="all", distance="euclidean", normalize=True, soft=False, swap=False,
    average_over="active",
):  # fmt: skip
    def d(i, j):
        return dist(c.x[i], c.x[j], distance, normalize)

    if mining == "explicit":
        chosen = [(i, i + 1, i + 2) for i in range(0, c.anchors, 3)]
        chosen = [t for t in chosen if all(c.keep[i] for i in t)]
    elif mining == "hard":
        chosen = []
        for a in c.rows():
            if c.positives(a) and c.negatives(a):
                farthest = max(c.positives(a), key=lambda p: d(a, p))
                chosen.append((a, farthest, min(c.negatives(a), key=lambda n: d(a, n))))
    elif mining == "semi_hard":
        chosen = []
        for a in c.rows():
            for p in c.positives(a):
                between = [n for n in c.negatives(a) if d(a, p) < d(a, n) < d(a, p) + margin]
                if between:
                    chosen.append((a, p, min(between, key=lambda n: d(a, n))))
    else:
        chosen = [(a, p, n) for a in c.rows() for p in c.positives(a) for n in c.negatives(a)]
    return triplets(c, chosen, margin, distance, normalize, soft, swap, average_over)


def triplets(c, chosen, margin, distance, normalize, soft, swap, average_over="active"):
    losses = []
    for a, p, n in chosen:
        d_an = dist(c.x[a], c.x[n], distance, normalize)
        if swap:
            d_an = min(d_an, dist(c.x[p], c.x[n], distance, normalize))
        gap = dist(c.x[a], c.x[p], distance, normalize) - d_an + margin
        losses.append(softplus(gap) if soft else max(gap, 0.0))
    return nonzero(losses) if average_over == "active" else average(losses)


def contrastive(
    c, positive_margin=0.0, negative_margin=1.0, pairs="batch", squared=False,
    distance="euclidean", normalize=True,
):  # fmt: skip
    power = 2 if squared else 1

    def term(i, j, positive):
        d = dist(c.x[i], c.x[j], distance, normalize)
        return max(d - positive_margin if positive else negative_margin - d, 0.0) ** power

    if pairs == "explicit":
        chosen = [i for i in range(0, c.anchors, 2) if c.keep[i] and c.keep[i + 1]]
        return average(term(i, i + 1, bool(c.sets[i] & c.sets[i + 1])) for i in chosen)
    attract = [term(i, j, True) for i in c.rows() for j in c.positives(i)]
    repel = [term(i, j, False) for i in c.rows() for j in c.negatives(i)]
    return nonzero(attract) + nonzero(repel)


def margin(
    c, margin=0.2, beta=None, beta_by="global", nu=0.0, distance="euclidean", normalize=True
):
    values = []
    for i in c.rows():
        b = c.params["beta"]
        if beta_by == "class":
            b = average(b[k] for k in sorted(c.sets[i]))
        for others, sign in ((c.positives(i), 1), (c.negatives(i), -1)):
            for j in others:
                gap = margin + sign * (dist(c.x[i], c.x[j], distance, normalize) - b)
                if gap > 0:
                    values.append(gap + nu * b)
    return average(values)


def multi_similarity(c, alpha=2.0, beta=50.0, base=0.5, distance="cosine"):
    values = []
    for i in c.rows():
        p = sum(math.exp(alpha * (base - sim(c.x[i], c.x[j], distance))) for j in c.positives(i))
        n = sum(math.exp(beta * (sim(c.x[i], c.x[j], distance) - base)) for j in c.negatives(i))
        values.append(math.log1p(p) / alpha + math.log1p(n) / beta)
    return average(values)


def circle(c, margin=0.4, scale=80.0, detached=None):
    """`detached`: the case whose cosines the factors see, so that differences hold them fixed."""
    detached = detached or c
    values = []
    for i in c.rows():
        p, n = c.positives(i), c.negatives(i)
        if not p or not n:
            continue
        fixed = {j: cos(detached.x[i], detached.x[j]) for j in p + n}
        attract = log_sum(
            [-scale * max(1 + margin - fixed[j], 0) * (cos(c.x[i], c.x[j]) - 1 + margin) for j in p]
        )
        repel = log_sum(
            [scale * max(fixed[j] + margin, 0) * (cos(c.x[i], c.x[j]) - margin) for j in n]
        )
        values.append(softplus(attract + repel))
    return nonzero(values)


def lifted_structure(c, margin=1.0, distance="euclidean", normalize=True):
    values = []
    for i in c.rows():
        p, n = c.positives(i), c.negatives(i)
        if p and n:
            far = log_sum([dist(c.x[i], c.x[j], distance, normalize) for j in p])
            near = log_sum([margin - dist(c.x[i], c.x[j], distance, normalize) for j in n])
            values.append(max(far + near, 0.0))
    return average(values)


def n_pairs(c, l2=0.0, distance="dot"):
    values = []
    others = [*range(1, c.anchors, 2), *range(c.anchors, len(c.x))]
    for i in range(0, c.anchors, 2):
        if i + 1 not in c.positives(i):
            continue
        own = sim(c.x[i], c.x[i + 1], distance)
        wrong = [
            math.exp(sim(c.x[i], c.x[j], distance) - own) for j in others if j in c.negatives(i)
        ]
        size = float(c.x[i] @ c.x[i] + c.x[i + 1] @ c.x[i + 1]) / 2
        values.append(math.log1p(sum(wrong)) + l2 * size)
    return average(values)


def nt_xent(c, temperature=0.07, distance="cosine"):
    values = []
    for i in c.rows():
        below = sum(math.exp(sim(c.x[i], c.x[j], distance) / temperature) for j in c.negatives(i))
        for j in c.positives(i):
            above = math.exp(sim(c.x[i], c.x[j], distance) / temperature)
            values.append(-math.log(above / (above + below)))
    return average(values)


def sup_con(c, temperature=0.1, distance="cosine"):
    values = []
    for i in c.rows():
        p, everyone = c.positives(i), c.positives(i) + c.negatives(i)
        if p:
            below = sum(math.exp(sim(c.x[i], c.x[j], distance) / temperature) for j in everyone)
            values.append(
                -average(sim(c.x[i], c.x[j], distance) / temperature - math.log(below) for j in p)
            )
    return nonzero(values)


def fast_ap(c, bins=10):
    width = 4 / bins

    def histogram(i, others):
        h = [0.0] * (bins + 1)
        for j in others:
            place = dist(c.x[i], c.x[j], "sqeuclidean") / width
            low = min(int(place), bins - 1)
            h[low] += 1 - (place - low)
            h[low + 1] += place - low
        return h

    values = []
    for i in c.rows():
        p = c.positives(i)
        if not p:
            continue
        h_p, h_n = histogram(i, p), histogram(i, c.negatives(i))
        total = sum_p = sum_all = 0.0
        for a, b in zip(h_p, h_n, strict=True):
            sum_p, sum_all = sum_p + a, sum_all + a + b
            total += a * sum_p / sum_all if sum_all > 0 else 0.0
        values.append(1 - total / len(p))
    return average(values)


def average_precisions(c, positive_step, negative_step, self_included):
    values = {}
    for i in c.rows():
        p, n = c.positives(i) + [i] * self_included, c.negatives(i)

        def ahead(k, j, i=i):
            return cos(c.x[i], c.x[k]) - cos(c.x[i], c.x[j])

        ranks = []
        for j in p:
            among = 1 + sum(positive_step(ahead(k, j)) for k in p if k != j)
            ranks.append(among / (among + sum(negative_step(ahead(k, j)) for k in n)))
        if p:
            values[i] = average(ranks)
    return values


def sigmoid(v):
    return math.exp(-softplus(-v))


def smooth_ap(c, temperature=0.01, self_included=False):
    def step(v):
        return sigmoid(v / temperature)

    return average(1 - v for v in average_precisions(c, step, step, self_included).values())


def roadmap(
    c, temperature=0.01, rho=100.0, delta=0.05, calibration=0.5, positive_threshold=0.9,
    negative_threshold=0.6, self_included=False,
):  # fmt: skip
    def bound(v):
        if v <= 0:
            return sigmoid(v / temperature)
        if v <= delta:
            return sigmoid(v / temperature) + 0.5
        return rho * (v - delta) + sigmoid(delta / temperature) + 0.5

    values = []
    found = average_precisions(c, lambda v: float(v >= 0), bound, self_included)
    for i, precision in found.items():
        low = [max(positive_threshold - cos(c.x[i], c.x[j]), 0) for j in c.positives(i)]
        high = [max(cos(c.x[i], c.x[j]) - negative_threshold, 0) for j in c.negatives(i)]
        values.append((1 - calibration) * (1 - precision))
        values[-1] += calibration * (average(low) + average(high))
    return average(values)


def mixed_pairs(c, mixup):
    """Each pair of positives that are `mixup` or less apart, round the batch; first the nearer."""
    pairs = set()
    for i in c.rows():
        order = [j % c.anchors for j in range(i + 1, i + c.anchors)]
        after = [j for j in order if j in c.positives(i)]
        for turn, j in enumerate(after[:mixup]):
            back = [k % c.anchors for k in range(j + 1, j + c.anchors)]
            other = [k for k in back if k in c.positives(j)].index(i)
            if (turn, i) < (other, j):
                pairs.add((i, j))
    return sorted(pairs)


def recall_at_k(c, ks=(1, 2, 4, 8, 16), temperature=0.01, k_temperature=1.0, mixup=0):
    x = [unit(row) for row in c.x]
    made = []
    for number, (i, j) in enumerate(mixed_pairs(c, mixup), 1):
        alpha = math.modf(number * (math.sqrt(5) - 1) / 2)[0]
        made.append((alpha * x[i] + (1 - alpha) * x[j], c.sets[i] & c.sets[j]))
    rows, sets = [row for row, _ in made], [own for _, own in made]
    n = c.anchors
    mixed = Case(
        np.array(x[:n] + rows + x[n:]), c.sets[:n] + sets + c.sets[n:],
        c.keep[:n] + [True] * len(made) + c.keep[n:], n + len(made), {},
        c.mined_positive, c.mined_negative,
    )  # fmt: skip
    widths = k_temperature if isinstance(k_temperature, tuple) else [k_temperature] * len(ks)
    values = []
    for i in mixed.rows():
        p, everyone = mixed.positives(i), mixed.positives(i) + mixed.negatives(i)
        s = mixed.x @ mixed.x[i]
        ranks = [1 + sum(sigmoid((s[z] - s[j]) / temperature) for z in everyone if z != j)
                 for j in p]  # fmt: skip
        if p:
            found = (
                sum(sigmoid((k - r) / w) for r in ranks) for k, w in zip(ks, widths, strict=True)
            )
            values.append(
                1 - average(min(f, k) / min(k, len(p)) for f, k in zip(found, ks, strict=True))
            )
    return average(values)


# --- hyperbolic space, and single pairs ----------------------------------------------------------


def in_ball(x, curvature, clip_radius):
    length = math.sqrt(float(x @ x))
    x = x * min(1, clip_radius / length)
    length, root = min(length, clip_radius), math.sqrt(curvature)
    return math.tanh(root * length) / (root * length) * x


def ball_distance(u, w, curvature):
    """By the Moebius addition of -u and w."""
    c, uw, uu, ww = curvature, -float(u @ w), float(u @ u), float(w @ w)
    added = ((1 + 2 * c * uw + c * ww) * -u + (1 - c * uu) * w) / (1 + 2 * c * uw + c**2 * uu * ww)
    root = math.sqrt(c)
    return 2 / root * math.atanh(root * math.sqrt(float(added @ added)))


def hyperbolic(c, temperature=0.2, curvature=0.1, clip_radius=2.3):
    u = [in_ball(x, curvature, clip_radius) for x in c.x]
    values = []
    for i in c.rows():
        z = {
            j: -ball_distance(u[i], u[j], curvature) / temperature for j in range(len(u)) if j != i
        }
        for p in c.positives(i):
            values.append(log_sum([z[p], *(z[n] for n in c.negatives(i))]) - z[p])
    return average(values)


def pairwise_sigmoid(c, scale=10.0, bias=-10.0):
    scale, bias = math.exp(c.params["logit_scale"]), c.params["logit_bias"]

    def logit(i, j):
        return scale * cos(c.x[i], c.x[j]) + bias

    return average(
        sum(softplus(-logit(i, p)) for p in c.positives(i))
        + sum(softplus(logit(i, n)) for n in c.negatives(i))
        for i in c.rows()
    )


# --- classes -----------------------------------------------------------------------------------


def _classify(c, logits_of, num_classes):
    """Mean over the items of the mean over their classes of -log softmax."""
    values = []
    for i in c.rows():
        own = sorted(c.sets[i])
        if own:
            z = [logits_of(c.x[i], k, k in c.sets[i]) for k in range(num_classes)]
            values.append(average(log_sum(z) - z[k] for k in own))
    return average(values)


def softmax(c):
    kernel, bias = c.params["kernel"], c.params["bias"]
    return _classify(c, lambda x, k, own: float(x @ kernel[:, k]) + bias[k], len(bias))


def normalized_softmax(c, temperature=0.05):
    q = c.params["proxies"]
    return _classify(c, lambda x, k, own: cos(x, q[k]) / temperature, len(q))


def _arc(s, degrees, scale):
    m, theta = math.radians(degrees), math.acos(max(-1.0, min(1.0, s)))
    return scale * (math.cos(theta + m) if theta <= math.pi - m else s - m * math.sin(m))


def arcface(c, margin_degrees=28.6, scale=64.0):
    q = c.params["proxies"]

    def logit(x, k, own):
        s = cos(x, q[k])
        return _arc(s, margin_degrees, scale) if own else scale * s

    return _classify(c, logit, len(q))


def sub_center_arcface(c, margin_degrees=28.6, scale=64.0, centers=3):
    q = c.params["proxies"]
    assert q.shape[1] == centers

    def logit(x, k, own):
        s = max(cos(x, q[k, j]) for j in range(centers))
        return _arc(s, margin_degrees, scale) if own else scale * s

    return _classify(c, logit, len(q))


def cosface(c, margin=0.35, scale=64.0):
    q = c.params["proxies"]
    return _classify(c, lambda x, k, own: scale * (cos(x, q[k]) - margin * own), len(q))


def soft_triple(c, scale=20.0, gamma=0.1, margin=0.01, centers=10, tau=0.2):
    q = c.params["proxies"]
    assert q.shape[1] == centers

    def logit(x, k, own):
        s = [cos(x, q[k, j]) for j in range(centers)]
        e = [math.exp(v / gamma) for v in s]
        return scale * (sum(a * b for a, b in zip(e, s, strict=True)) / sum(e) - margin * own)

    spread = sum(
        dist(q[k, i], q[k, j]) for k in range(len(q)) for i in range(centers) for j in range(i)
    )
    pairs = len(q) * centers * (centers - 1)
    loss = _classify(c, logit, len(q))
    return loss + (tau * spread / pairs if pairs and c.rows() else 0.0)


def proxy_nca(c, scale=1.0, own_in_denominator=True):
    q = c.params["proxies"]

    def logit(x, k):
        return -scale * dist(x, q[k], "sqeuclidean")

    if own_in_denominator:
        return _classify(c, lambda x, k, own: logit(x, k), len(q))
    values = []
    for i in c.rows():
        others = [logit(c.x[i], k) for k in range(len(q)) if k not in c.sets[i]]
        if others and c.sets[i]:
            values.append(average(log_sum(others) - logit(c.x[i], k) for k in sorted(c.sets[i])))
    return average(values)


def proxy_anchor(c, margin=0.1, alpha=32.0):
    q = c.params["proxies"]
    attract, repel = [], []
    for k in range(len(q)):
        own = [i for i in c.rows() if k in c.sets[i]]
        if own:
            attract.append(
                math.log1p(sum(math.exp(-alpha * (cos(c.x[i], q[k]) - margin)) for i in own))
            )
        other = [i for i in c.rows() if k not in c.sets[i]]
        repel.append(math.log1p(sum(math.exp(alpha * (cos(c.x[i], q[k]) + margin)) for i in other)))
    return average(attract) + average(repel)
