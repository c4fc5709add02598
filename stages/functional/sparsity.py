"""Which weights of a matrix go to zero, and what the others then become.

A mask is a bool [rows, columns], True where the weight goes. What is zero already goes first and stays zero, whatever the score, so
that a second round only adds to the zeros of the first.

    magnitude    |W|, compared over the whole matrix
    Wanda        |W| * ||X||_2 of the weight's input channel, compared within each row (Sun et al., 2023, https://arxiv.org/abs/2306.11695)
    SparseGPT    W^2 / diag(H^-1)^2 in blocks of columns; the error of what goes is made good by the columns to come (Frantar & Alistarh,
                 2023, https://arxiv.org/abs/2301.00774)

With 2:4 the comparison is within each four consecutive columns of a row, of which two go.
"""

import itertools

import torch


def magnitude_mask(weight: torch.Tensor, count: int | None) -> torch.Tensor:
    """The `count` smallest |weight| of [rows, columns]; None: 2:4."""
    scores = weight.abs().float()
    return two_of_four(scores) if count is None else smallest(scores, count)


def wanda_mask(weight: torch.Tensor, norms: torch.Tensor, row_count: int | None) -> torch.Tensor:
    """`row_count` weights of each row of [rows, columns]; None: 2:4. `norms` [columns]: L2 norm of each input over all tokens."""
    scores = torch.where(weight == 0, -1.0, weight.abs().float() * norms)  # -1: also before a weight whose input is always 0
    if row_count is None:
        return two_of_four(scores)
    lowest = scores.topk(row_count, dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Exactly `count` of [rows, columns]. Of equal scores, which 16-bit weights have many of, evenly many from top to bottom."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.flatten().kthvalue(count).values
    mask = scores < threshold
    equal = (scores == threshold).flatten().nonzero().squeeze(1)
    missing = count - int(mask.sum())
    mask.view(-1)[equal[torch.arange(missing, device=equal.device) * len(equal) // missing]] = True
    return mask


def two_of_four(scores: torch.Tensor) -> torch.Tensor:
    """The two lowest of each four consecutive columns of [rows, columns], by their ranks; of equal ones the left one."""
    fours = [scores[:, i::4].contiguous() for i in range(4)]
    lower = [torch.zeros_like(one, dtype=torch.int8) for one in fours]  # how many of the four are lower
    for i, j in itertools.combinations(range(4), 2):
        first = fours[i] <= fours[j]
        lower[j] += first
        lower[i] += ~first
    return torch.stack([rank < 2 for rank in lower], -1).flatten(1)


def add_squares(total: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """[columns] sum of squares over the tokens of `inputs` [tokens, columns], in fp32, and those of before."""
    squares = inputs.float().square().sum(0)
    return squares if total is None else total.add_(squares)


def add_products(total: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """[columns, columns] X^T X of `inputs` X [tokens, columns], in fp32, and those of before: half the Hessian of the output's squared
    error, for every row of the weight alike."""
    inputs = inputs.float()
    return inputs.T @ inputs if total is None else total.addmm_(inputs.T, inputs)


def inverse_factor(hessian: torch.Tensor, dampening_frac: float) -> torch.Tensor:
    """[columns, columns] upper Cholesky factor U of the dampened Hessian's inverse, which is U^T U; the Hessian's scale does not matter.

    Row i over its diagonal is what a unit of error in column i asks of the columns after it, those before being settled.
    Takes the place of `hessian`. torch.linalg.LinAlgError where there is no inverse.
    """
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always 0: its weights correct nothing
    diagonal += dampening_frac * diagonal.mean()
    torch.linalg.cholesky(hessian, out=hessian)
    torch.cholesky_inverse(hessian, out=hessian)
    factor: torch.Tensor = torch.linalg.cholesky(hessian, upper=True, out=hessian)
    return factor


def sparsegpt(weight: torch.Tensor, factor: torch.Tensor, count: int | None, block_size: int = 128) -> torch.Tensor:
    """[rows, columns] in fp32: `count` weights are zero (None: 2:4), the others corrected for that. `factor` as of `inverse_factor`.

    Each block of columns takes its even part of `count`; with 2:4 a block is a multiple of four columns.
    """
    weight = weight.to(torch.float32, copy=True)
    columns, gone = weight.shape[1], weight == 0
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        wanted = None if count is None else count * last // columns - int(gone[:, :first].sum())
        errors = _prune_block(weight[:, first:last], gone[:, first:last], factor[first:last, first:last], wanted)
        weight[:, last:] -= errors @ factor[first:last, last:]
    return weight.masked_fill_(gone, 0)


def _prune_block(block: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor, wanted: int | None) -> torch.Tensor:
    """Prune [rows, width] in place and enter what goes into `mask`. Returns each column's error over its diagonal, [rows, width]."""
    diagonal, zeros = factor.diagonal(), mask.clone()

    def scores(span: slice) -> torch.Tensor:
        return torch.where(zeros[:, span], -1.0, (block[:, span] / diagonal[span]).square())

    if wanted is not None:
        mask |= smallest(scores(slice(None)), wanted)
    errors = torch.empty_like(block)
    for i in range(block.shape[1]):
        if wanted is None and i % 4 == 0:  # with the corrections of all columns before these four
            four = slice(i, i + 4)
            mask[:, four] |= two_of_four(scores(four))
        errors[:, i] = block[:, i] * mask[:, i] / diagonal[i]
        block[:, i:] -= errors[:, i, None] * factor[i, i:]
    return errors
