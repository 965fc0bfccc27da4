"""Tokens that a pooling puts at the end of every item, by way of the chat template: so an export does it too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Returns the learned embeddings (tokens, H). A function, because the tensor may be another one in each step.
LearnedTokens = Callable[[], Tensor]


def append_tokens(processor: Any, tokens: Sequence[str], known: bool) -> None:
    """Let a chat template end with some tokens.

    Args:
        processor: Of transformers. Its template is changed, and its vocabulary where the tokens are new.
        tokens: In order.
        known: Whether they have to be in the vocabulary; else they must not.

    Raises:
        ValueError: If they are not, or are.
    """
    vocabulary = processor.tokenizer.get_vocab()
    wrong = [token for token in tokens if (token in vocabulary) != known]
    if wrong:
        raise ValueError(
            f"The pooling appends {wrong} to every item, which the checkpoint's vocabulary "
            + ("does not have. Name a token that it has." if known else "has already. Rename the pooling's tokens.")
        )
    if not tokens:
        return
    if not known:
        processor.tokenizer.add_tokens(list(tokens), special_tokens=True)
    # Jinja itself drops a newline at the end.
    processor.chat_template = processor.chat_template.removesuffix("\n") + "".join(tokens)


def learn_tokens(model: Any, tokenizer: Any, tokens: Sequence[str], learned: LearnedTokens) -> None:
    """Let a model read learned embeddings where it finds some tokens.

    The model's own table gets rows for them, which nobody reads until `write_tokens` fills them.

    Args:
        model: Of transformers, without adapters.
        tokenizer: Knows the tokens.
        tokens: In the order of the embeddings.
        learned: Returns the embeddings.
    """
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    first = tokenizer.convert_tokens_to_ids(tokens[0])

    def read(_: Any, arguments: tuple[Int[Tensor, "*B L"]], output: Float[Tensor, "*B L H"]) -> Tensor:
        rows = arguments[0] - first
        # Behind all other tokens, one after the other.
        found = learned().to(output.dtype)[rows.clamp(0, len(tokens) - 1)]
        return torch.where((rows >= 0)[..., None], found, output)

    model.get_input_embeddings().register_forward_hook(read)


@torch.no_grad()
def write_tokens(model: Any, tokenizer: Any, tokens: Sequence[str], learned: LearnedTokens) -> None:
    """Write learned embeddings into the model's own table."""
    first = tokenizer.convert_tokens_to_ids(tokens[0])
    table = model.get_input_embeddings().weight
    table[first : first + len(tokens)] = learned().to(table)
