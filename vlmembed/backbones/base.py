"""Any vision-language model that transformers opens, as a backbone: hidden states of items."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, is_flash_attn_2_available

from vlmembed.backbones.chat_templates import PairTemplate, TokenEmbeddings, append_tokens, check_template, learn_tokens
from vlmembed.backbones.preprocessing import ChatPreprocessor
from vlmembed.distributed import print_once
from vlmembed.kernels import compile_layers, use_liger
from vlmembed.types import Inputs, Role

HEAD = "lm_head.weight"

#: Of each distinct image of a batch, by its index: (tokens, levels, H), from `VisionLanguageModel.encode_images`.
Features = Sequence[Tensor] | Mapping[int, Tensor]

#: The default instruction of Qwen3-VL-Embedding (arXiv:2601.04720).
DEFAULT_INSTRUCTION = "Represent the user's input."


class VisionLanguageModel(nn.Module):
    """Any vision-language model with a chat template that transformers' ``AutoModel`` and ``AutoProcessor`` open.

    The defaults are the Qwen3-VL-Embedding layout: a default instruction as the system message and the generation
    prompt at the end, to be pooled at the last token. The weights are read in `configure`, not before.

    Args:
        checkpoint: A checkpoint folder or a Hub id.
        revision: The Hub revision: a branch, tag or commit.
        dtype: The type of the weights; ``auto`` keeps the checkpoint's. Train in float32 with the trainer's
            ``precision: bf16-mixed``, or in bfloat16 with ``precision: bf16-true``.
        attn_implementation: ``auto`` takes flash_attention_2 where CUDA and flash-attn are there and the weights are
            in half precision, else sdpa.
        bidirectional: Whether every token attends to every other, instead of to those before it only.
        query_instruction: The system message for queries; null for none.
        document_instruction: The system message for documents; null for none.
        generation_prompt: Whether the input ends with the chat template's opening of an answer.
        max_length: The most tokens an item may have; a longer text is cut, a longer item with images is refused.
        gradient_checkpointing: Whether to keep one activation per layer and recompute the rest: less memory, more time.
        load_in_4bit: Whether to load the weights as 4-bit NF4, for QLoRA (arXiv:2305.14314); needs bitsandbytes
            and CUDA.
        torch_compile: Whether PyTorch compiles the parts of the layers; worth its minutes in long runs on a GPU.
        liger: Whether Qwen3-VL runs norms, MLPs and rotary positions through Liger's kernels; needs liger-kernel and
            CUDA.
        trust_remote_code: Whether to run code that comes with the checkpoint.
    """

    #: Parts of the model by name, as patterns of parameter names tried in this order: the first match decides.
    groups: ClassVar[dict[str, str]] = {
        "merger": r"(^|\.)(merger|deepstack_merger_list|multi_modal_projector|connector)\.",
        "vision": r"(^|\.)(visual|vision_tower|vision_model)\.",
        "language": r"",
    }

    # All three are set by `configure`.
    model: PreTrainedModel
    preprocessor: ChatPreprocessor
    learned_tokens: TokenEmbeddings | None = None

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        revision: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto",
        bidirectional: bool = False,
        query_instruction: str | None = DEFAULT_INSTRUCTION,
        document_instruction: str | None = DEFAULT_INSTRUCTION,
        generation_prompt: bool = True,
        max_length: int | None = None,
        gradient_checkpointing: bool = False,
        load_in_4bit: bool = False,
        torch_compile: bool = False,
        liger: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint = str(checkpoint)
        self.revision = revision
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.bidirectional = bidirectional
        self.instructions: dict[Role, str | None] = {"query": query_instruction, "document": document_instruction}
        self.generation_prompt = generation_prompt
        self.max_length = max_length
        self.gradient_checkpointing = gradient_checkpointing
        self.load_in_4bit = load_in_4bit
        self.torch_compile = torch_compile
        self.liger = liger
        self.trust_remote_code = trust_remote_code

    # Preprocessing, which needs no weights

    def make_preprocessor(
        self, template: PairTemplate | None = None, appended: Sequence[str] = (), new_tokens: bool = False
    ) -> ChatPreprocessor:
        """Make the preprocessor of this backbone's inputs; it can be sent to loader workers.

        Args:
            template: How pairs are read, for a cross-encoder; None to read items with the backbone's instructions.
            appended: Tokens that every input gets at its end.
            new_tokens: Whether the checkpoint does not know them.

        Raises:
            ValueError: If the checkpoint has no processor for images and texts, its template drops what it is given,
                or tokens to append are unknown, or known although they should be new.
        """
        processor = self.open_processor()
        instructions: dict[Role, str | None] = {"query": None, "document": None} if template else self.instructions
        if template is not None:
            processor.chat_template = template.source
        elif isinstance(processor.chat_template, dict):
            processor.chat_template = processor.chat_template["default"]
        roles = ("query", "document") if template else ("system", "user") if any(instructions.values()) else ("user",)
        origin = type(template).__name__ if template else f"The chat template of {self.checkpoint!r}"
        check_template(processor, roles, origin)
        append_tokens(processor, appended, new_tokens)
        return self._preprocessor_class(template)(
            processor, instructions, self.generation_prompt, self.max_length, template, appended
        )

    def _preprocessor_class(self, template: PairTemplate | None) -> Any:
        return ChatPreprocessor

    def open_processor(self) -> ProcessorMixin:
        """Open the checkpoint's own processor."""
        self.load_config()  # Says more clearly than the next line what is wrong with a checkpoint.
        processor = AutoProcessor.from_pretrained(self.checkpoint, **self._source)
        for part in ("image_processor", "chat_template"):
            if getattr(processor, part, None) is None:
                raise ValueError(f"The checkpoint {self.checkpoint!r} has no {part.replace('_', ' ')}.")
        return processor

    def load_config(self) -> PretrainedConfig:
        """Read the checkpoint's configuration.

        Raises:
            ValueError: If there is none, or it is not a vision-language model's.
        """
        try:
            config = AutoConfig.from_pretrained(self.checkpoint, **self._source)
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot open the checkpoint {self.checkpoint!r}: {error}") from error
        if not hasattr(config, "vision_config"):
            raise ValueError(
                f"The checkpoint {self.checkpoint!r} is a {config.model_type!r}, not a vision-language model "
                "(its configuration has no vision_config). Name a model such as Qwen/Qwen3-VL-2B-Instruct."
            )
        return config

    @property
    def _source(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    # Weights

    def configure(
        self, preprocessor: ChatPreprocessor | None = None, learned_tokens: TokenEmbeddings | None = None
    ) -> None:
        """Load the weights.

        Args:
            preprocessor: From `make_preprocessor`; None for the one of its defaults.
            learned_tokens: Returns the embeddings of the tokens that it appends, where they are learned.

        Raises:
            ValueError: If the checkpoint is not a whole vision-language model, or an option cannot be served.
        """
        self.preprocessor = preprocessor or self.make_preprocessor()
        self.learned_tokens = learned_tokens
        self._load_model()
        # Opened for inference, with dropout off; whoever measures turns it off again.
        self.model.train()
        if learned_tokens is not None:
            tokenizer = self.preprocessor.processor.tokenizer
            learn_tokens(self.model, tokenizer, self.preprocessor.appended, learned_tokens)
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.liger:
            use_liger(self.model)
        if self.torch_compile:
            compile_layers(self.model)

    def _load_model(self) -> None:
        config = self.load_config()
        if checkpoint_file(self.checkpoint, "adapter_config.json", self.revision):
            raise ValueError(
                f"The checkpoint {self.checkpoint!r} has an adapter beside its weights (adapter_config.json). Merge it "
                "into them (peft's merge_and_unload), or remove its files to begin without it."
            )
        if self.bidirectional:
            # transformers reads the flag from the decoder's own config; at the top level it does nothing.
            config.get_text_config().is_causal = False
        self.model, loading = AutoModel.from_pretrained(
            self.checkpoint,
            config=config,
            dtype=self.dtype,
            attn_implementation=self._attention(config),
            quantization_config=_quantization() if self.load_in_4bit else None,
            use_safetensors=True,  # Not the pickles that old checkpoints are.
            output_loading_info=True,
            **self._source,
        )
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(
                f"The checkpoint {self.checkpoint!r} lacks {len(missing)} weights of the model, which would be random: "
                f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}. Name a complete checkpoint."
            )
        if modules := _other_modules(self.checkpoint, self.revision):
            print_once(
                f"{self.checkpoint} has weights of {', '.join(modules)} (modules.json). They are not loaded: the "
                "backbone is loaded, what stands behind it begins anew."
            )

    def _attention(self, config: PretrainedConfig) -> str:
        if self.attn_implementation != "auto":
            return self.attn_implementation
        dtype = config.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        half = dtype in (torch.float16, torch.bfloat16)
        return "flash_attention_2" if half and torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"

    @property
    def hidden_size(self) -> int:
        """H, the size of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def lm_head_rows(self, tokens: Sequence[int]) -> Float[Tensor, "tokens H"] | None:
        """Read some rows of the checkpoint's language-model head; None where it is the token embeddings."""
        if self.model.config.tie_word_embeddings:
            return None
        return head_rows(self.checkpoint, tokens, self.revision).to(self.device, self.model.dtype)

    def embed(self, tokens: Sequence[int]) -> Float[Tensor, "tokens H"]:
        """Return the embeddings of some tokens, as they are being trained."""
        embedded: Tensor = self.model.get_input_embeddings()(torch.tensor(tokens, device=self.device))
        return embedded

    def group_of(self, name: str) -> str:
        """Return the group that a parameter's name falls in."""
        return next(group for group, pattern in self.groups.items() if re.search(pattern, name))

    def vision_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what images go through before they meet the text, with names."""
        return (entry for entry in self.named_parameters() if self.group_of(entry[0]) != "language")

    @property
    def trains_vision(self) -> bool:
        """Whether anything that images go through has a gradient."""
        return any(parameter.requires_grad for _, parameter in self.vision_parameters())

    # Forward

    @property
    def separate_vision_pass(self) -> bool:
        """Whether images come in chunks of their own, for `encode_images`."""
        return False

    def encode_images(self, images: Inputs) -> Sequence[Float[Tensor, "tokens levels H"]]:
        """Run the vision tower on a chunk of images, where the preprocessor makes such chunks.

        Returns:
            Of each image, what stands at its tokens, at every level of the language model that images enter.
        """
        raise NotImplementedError(f"{type(self).__name__} reads images together with their text.")

    def forward(
        self, inputs: Inputs, layers: Sequence[int] = (-1,), features: Features = (), num_last_tokens: int | None = None
    ) -> Float[Tensor, "*K B L H"]:
        """Return hidden states.

        Args:
            inputs: One chunk, from the `preprocessor`, on any device.
            layers: Which hidden states: -1 is the last one, after the final norm; 0 the token embeddings.
            features: Of each image of the batch, by its index, where `encode_images` made them.
            num_last_tokens: How many of an item's last tokens will be read, if not all; other states may be NaN.

        Returns:
            (B, L, H), or (K, B, L, H) for K layers.
        """
        # Chunks wait on the host and come over one at a time, so device memory does not grow with the batch.
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        output = self.model(**inputs, use_cache=False, output_hidden_states=tuple(layers) != (-1,))
        states = [output.last_hidden_state if layer == -1 else output.hidden_states[layer] for layer in layers]
        return states[0] if len(states) == 1 else torch.stack(states)


def _quantization() -> object:
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not (torch.cuda.is_available() and is_bitsandbytes_available()):
        raise ValueError(
            "load_in_4bit needs a CUDA device and the bitsandbytes package "
            f"(CUDA: {torch.cuda.is_available()}, bitsandbytes: {is_bitsandbytes_available()}). "
            "Install vlmembed[quantization] on a machine with a GPU, or set load_in_4bit: false."
        )
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)


# Files of a checkpoint that AutoModel does not read


def checkpoint_file(checkpoint: str, name: str, revision: str | None) -> str | None:
    """Return the path of a file of a checkpoint, a folder or a Hub id; None if it has no such file."""
    tolerant = ("gated_repo", "missing_entries", "connection_errors")
    options: dict[str, Any] = {f"_raise_exceptions_for_{problem}": False for problem in tolerant}
    return cached_file(checkpoint, name, revision=revision, **options)


def _other_modules(checkpoint: str, revision: str | None) -> list[str]:
    """Name the modules of a Sentence Transformers folder that have weights behind the transformer's."""
    path = checkpoint_file(checkpoint, "modules.json", revision)
    modules = json.loads(Path(path).read_text(encoding="utf-8")) if path else []
    return [
        module["type"].rsplit(".", 1)[-1]
        for module in modules
        if module["path"] and checkpoint_file(checkpoint, f"{module['path']}/{SAFE_WEIGHTS_NAME}", revision)
    ]


def label_token_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Return the token of each word; refuse a word that is not one token, or the same as another."""
    tokens = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    for word, ids in zip(words, tokens, strict=True):
        if len(ids) != 1:
            raise ValueError(
                f"The answer {word!r} is {len(ids)} tokens of this checkpoint ({tokenizer.convert_ids_to_tokens(ids)}),"
                " and a score needs one. Choose another word for the head's yes or no."
            )
    if len({ids[0] for ids in tokens}) < len(words):
        raise ValueError(f"The answers {list(words)} are the same token; a score is the difference of two.")
    return [ids[0] for ids in tokens]


def head_rows(checkpoint: str, tokens: Sequence[int], revision: str | None = None) -> Float[Tensor, "tokens H"]:
    """Read rows of a checkpoint's language-model head, and nothing else; refuse a checkpoint that has none."""
    index = checkpoint_file(checkpoint, SAFE_WEIGHTS_INDEX_NAME, revision)
    files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"] if index else {}
    if path := checkpoint_file(checkpoint, files.get(HEAD, SAFE_WEIGHTS_NAME), revision):
        with safe_open(path, framework="pt") as file:
            if HEAD in [*file.keys()]:
                rows = file.get_slice(HEAD)
                return torch.stack([rows[token] for token in tokens])
    raise ValueError(
        f"The checkpoint {checkpoint!r} has no {HEAD} in safetensors, so there are no logits of yes and no. Use "
        "another score head, such as vlmembed.heads.Linear."
    )
