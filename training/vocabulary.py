"""The word embeddings that a run trains: the rows of the tokens in its texts, since no other row gets a gradient.

    with used_vocabulary(model, used_ids(processor, texts)):
        ...  # train

XLM-R has 250,002 pieces, of which the captions of one language use a few thousand. Gradients, Adam's moments and
checkpoints are then of these rows alone. The weights are those of a run that trains the whole table, as long as nothing
but a gradient moves a row: without weight decay.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_capivara import CapivaraModel


class UsedRows(nn.Module):
    """In the place of an embedding: some of its rows, to be trained, in `part`; the others as they are in the table."""

    def __init__(self, whole: nn.Embedding, ids: Tensor):
        super().__init__()
        row_of = torch.full((whole.num_embeddings,), -1, device=whole.weight.device)
        row_of[ids] = torch.arange(len(ids), device=row_of.device)
        padding = None if whole.padding_idx is None else int(row_of[whole.padding_idx])
        self.part = nn.Embedding(
            len(ids), whole.embedding_dim, padding_idx=padding, _weight=whole.weight.detach()[ids].clone()
        )
        for name, tensor in (("ids", ids), ("row_of", row_of), ("table", whole.weight.detach())):
            self.register_buffer(name, tensor, persistent=False)  # in no checkpoint

    def forward(self, ids: Tensor) -> Tensor:
        """(texts, tokens, width) for ids (texts, tokens). In training, ValueError where the row of one is not trained.

        It is looked for on the CPU alone: a GPU would be waited for.
        """
        rows = self.row_of[ids]
        if self.training and rows.device.type == "cpu" and (rows < 0).any():
            raise ValueError(
                f"The token {ids[rows < 0][0]} is in none of the texts of this training: its row is fixed."
            )
        return torch.where((rows < 0).unsqueeze(-1), F.embedding(ids, self.table), self.part(rows.clamp(min=0)))

    def write_back(self, whole: nn.Embedding) -> None:
        """Give `whole` the rows as they are now."""
        whole.weight.data = self.table
        whole.weight.data[self.ids] = self.part.weight.detach()


@contextmanager
def used_vocabulary(model: CapivaraModel, ids: Tensor) -> Iterator[None]:
    """Within it, of the word embeddings only the rows `ids` are parameters; after it the model is whole again.

    Nothing changes where they are not trained at all, or are not a plain table that is there once, as in adapters.
    """
    whole = model.get_input_embeddings()
    plain = type(whole) is nn.Embedding and whole.weight.requires_grad
    wrapped = any(module is whole and "modules_to_save" in name for name, module in model.named_modules())  # by peft
    if not plain or wrapped or sum(getattr(module, "weight", None) is whole.weight for module in model.modules()) != 1:
        yield
        return
    if whole.padding_idx is not None:
        ids = torch.cat([ids, torch.tensor([whole.padding_idx])]).unique()
    model.set_input_embeddings(UsedRows(whole, ids.to(whole.weight.device)).train(model.training))
    try:
        yield
    finally:
        model.get_input_embeddings().write_back(whole)
        model.set_input_embeddings(whole)


@contextmanager
def whole_vocabulary(model: CapivaraModel) -> Iterator[None]:
    """Within it, a model in training has its word embeddings as it will be saved with them."""
    used = model.get_input_embeddings()
    if not isinstance(used, UsedRows):
        yield
        return
    whole = nn.Embedding.from_pretrained(used.table, padding_idx=model.config.text_config.pad_token_id)
    used.write_back(whole)
    model.set_input_embeddings(whole)
    try:
        yield
    finally:
        model.set_input_embeddings(used)
