"""`rows`: a change of some rows, and the gradients of it, are those of torch's own indexing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reft_serve.training.model.row_edit import edit_rows


def plainly(h_ND: Tensor, rows_E: Tensor, edit: nn.Module) -> Tensor:
    return h_ND.index_copy(0, rows_E, edit(h_ND.index_select(0, rows_E)))


@pytest.mark.parametrize("rows", [[], [3], [7, 0, 4], list(range(9))], ids=str)
@pytest.mark.parametrize("learns_below", [True, False])
def test_values_and_gradients_are_those_of_plain_indexing(
    rows: list[int], learns_below: bool
) -> None:
    torch.manual_seed(0)
    edit = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()
    start = torch.randn(9, 5, dtype=torch.float64, requires_grad=learns_below)
    pull = torch.randn(9, 5, dtype=torch.float64)
    rows_E = torch.tensor(rows, dtype=torch.long)
    found = []
    for how in (edit_rows, plainly):
        h_ND = 2 * start
        before = h_ND.detach().clone()
        # twice, as the two parts of a rule do
        out = how(how(h_ND, rows_E, edit), rows_E.flip(0)[:2], edit)
        assert torch.equal(h_ND, before)
        learning = [*edit.parameters(), *([start] if learns_below else [])]
        found.append([out, *torch.autograd.grad((out * pull).sum(), learning)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
