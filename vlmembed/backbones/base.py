"""Any vision-language model that transformers opens, as a backbone: hidden states of items."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME, is_flash_attn_2_available
from transformers.utils.hub import cached_files
from transformers.utils.import_utils import is_bitsandbytes_available

from vlmembed.backbones.chat_templates import (
    PairTemplate,
    TokenEmbeddings,
    append_tokens,
    check_template,
    expand_queries,
    learn_tokens,
)
from vlmembed.backbones.preprocessing import ChatPreprocessor
from vlmembed.distributed import print_once
from vlmembed.files import read_json
from vlmembed.kernels import compile_layers, use_liger
from vlmembed.types import Inputs, Role

#: The language-model head; in a whole Omni checkpoint the thinker's, as the talker has one, too.
HEAD = "lm_head.weight"
THINKER_HEAD = f"thinker.{HEAD}"

#: What a checkpoint has and transformers' forward never reads, so that it would have no gradient.
NEVER_READ = r"audio_tower\.audio_bos_eos_token\."

#: Of each distinct image of a batch, by its index: (tokens, levels, H), from `VisionLanguageModel.encode_images`.
Features = Sequence[Tensor] | Mapping[int, Tensor]

#: The default instruction of Qwen3-VL-Embedding (arXiv:2601.04720).
DEFAULT_INSTRUCTION = "Represent the user's input."


class VisionLanguageModel(nn.Module):
    """Any vision-language model with a chat template that transformers' ``AutoModel`` and ``AutoProcessor`` open.

    The defaults are the Qwen3-VL-Embedding layout: a default instruction as the system message and the generation
    prompt at the end, to be pooled at the last token. The weights are read in `configure`, not before. Of a checkpoint
    that also speaks, such as Qwen2.5-Omni, only the thinker is opened, which reads, sees and hears.

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
    all_groups: ClassVar[dict[str, str]] = {
        "audio": r"(^|\.)audio_tower\.",
        "merger": r"(^|\.)(merger|merger_list|deepstack_merger_list|multi_modal_projector|connector)\.",
        "vision": r"(^|\.)(visual|vision_tower|vision_model)\.",
        "language": r"",
    }

    # All four are set by `configure`.
    groups: dict[str, str]  #: Those that the model has.
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
        self,
        template: PairTemplate | None = None,
        appended: Sequence[str] = (),
        new_tokens: bool = False,
        expansion_tokens: int | Sequence[str] | None = None,
    ) -> ChatPreprocessor:
        """Make the preprocessor of this backbone's inputs; it can be sent to loader workers.

        It reads pairs by a template, or items with the backbone's instructions. Every input ends with the tokens
        ``appended``, which the checkpoint knows unless they are new, and every query with the ``expansion_tokens``.
        What does not fit is refused by a ``ValueError``.
        """
        processor: Any = self.open_processor()
        instructions: dict[Role, str | None] = {"query": None, "document": None} if template else self.instructions
        if template is not None:
            processor.chat_template = template.source
        elif isinstance(processor.chat_template, dict):
            if "default" not in processor.chat_template:
                raise ValueError(f"None of the chat templates of {self.checkpoint!r} is called default: rename one.")
            processor.chat_template = processor.chat_template["default"]
        check_template(
            processor,
            template.origin if template else f"The chat template of {self.checkpoint!r}",
            ("query", "document") if template else ("user",),
            {*instructions.values()},
            self.generation_prompt,
        )
        append_tokens(processor, appended, new_tokens)
        expansion = expand_queries(processor, expansion_tokens)
        return self._preprocessor_class(template)(
            processor, instructions, self.generation_prompt, self.max_length, template, appended, expansion
        )

    def _preprocessor_class(self, template: PairTemplate | None) -> Any:
        return ChatPreprocessor

    def open_processor(self) -> ProcessorMixin:
        """Open the checkpoint's own processor; refuse one that does not fit the model."""
        with self._opening():
            adapter = self._files("adapter_config.json", "adapter_model.safetensors")
        if adapter:
            raise ValueError(
                f"The checkpoint {self.checkpoint!r} has an adapter ({Path(adapter[0]).name}). Merge it into its base "
                "model (peft's merge_and_unload) and name that, or remove its files to begin without it."
            )
        config = self.load_config()
        with self._opening():
            processor = AutoProcessor.from_pretrained(self.checkpoint, **self._source)
        for part in ("image_processor", "chat_template", "tokenizer"):
            if not getattr(processor, part, None):
                raise ValueError(f"The checkpoint {self.checkpoint!r} has no {part.replace('_', ' ')}.")
        # Without its file, transformers makes one of no words.
        if not processor.tokenizer("one", add_special_tokens=False)["input_ids"]:
            raise ValueError(f"The tokenizer of {self.checkpoint!r} knows no words. Is its tokenizer.json there?")
        for name in ("image_token_id", "video_token_id", "audio_token_id"):
            tokens = [token for part in (processor, config) if (token := getattr(part, name, None)) is not None]
            if len({*tokens}) > 1:
                raise ValueError(
                    f"In the checkpoint {self.checkpoint!r} the processor's {name} is {tokens[0]}, and config.json "
                    f"has {tokens[1]}: they are of two models."
                )
        return processor

    def load_config(self) -> PretrainedConfig:
        """Read the checkpoint's configuration; refuse one that is not a vision-language model's."""
        with self._opening():
            config = AutoConfig.from_pretrained(self.checkpoint, **self._source)
        if (thinker := getattr(config, "thinker_config", None)) is not None:
            dtype, config = config.dtype, thinker
            config.dtype = config.dtype or dtype
            # Theirs is of an older release, and unknown to transformers; an export names the class.
            config.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type]]
        if not hasattr(config, "vision_config"):
            raise ValueError(
                f"The checkpoint {self.checkpoint!r} is a {config.model_type!r}, not a vision-language model "
                "(its configuration has no vision_config). Name a model such as Qwen/Qwen3-VL-2B-Instruct."
            )
        return config

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Name the folder, and a broken file of it, where an error of transformers does not."""
        try:
            yield
        except Exception as error:
            for path in sorted(Path(self.checkpoint).glob("*.json")):
                read_json(path)
            raise ValueError(
                f"Cannot open the checkpoint {self.checkpoint!r}: {type(error).__name__}: {error}"
            ) from error

    @property
    def _source(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def _files(self, *names: str) -> list[str]:
        """Return the paths of those of some files that the checkpoint has."""
        tolerant = ("gated_repo", "missing_entries", "connection_errors")
        options: dict[str, Any] = {f"_raise_exceptions_for_{problem}": False for problem in tolerant}
        return cached_files(self.checkpoint, [*names], revision=self.revision, **options) or []

    def _json(self, name: str) -> Any:
        """Return the content of a JSON file; an empty mapping where the checkpoint has none."""
        return next(map(read_json, self._files(name)), {})

    # Weights

    def configure(
        self, preprocessor: ChatPreprocessor | None = None, learned_tokens: TokenEmbeddings | None = None
    ) -> None:
        """Load the weights; refuse a checkpoint that is not whole, or an option that cannot be served.

        ``learned_tokens`` returns the embeddings of the tokens that the preprocessor appends, where they are learned.
        """
        self.preprocessor = preprocessor or self.make_preprocessor()
        self.learned_tokens = learned_tokens
        self._load_model()
        # Opened for inference, with dropout off; whoever measures turns it off again.
        self.model.train()
        tokenizer = self.preprocessor.processor.tokenizer
        if learned_tokens is not None:
            learn_tokens(self.model, tokenizer, self.preprocessor.appended, learned_tokens)
        rows: Any = self.model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise ValueError(
                f"The tokenizer of {self.checkpoint!r} has {len(tokenizer)} tokens, its weights embed {rows}: they are "
                "of two models."
            )
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.liger:
            use_liger(self.model)
        if self.torch_compile:
            compile_layers(self.model)

    def adopt(self, model: PreTrainedModel, preprocessor: ChatPreprocessor) -> None:
        """Compute with a model that is loaded already, as Sentence Transformers loads that of a folder."""
        self.model, self.preprocessor = model, preprocessor

    def _load_model(self) -> None:
        config = self.load_config()
        self._weight_files()  # Says more clearly than transformers which one is broken.
        # transformers reads the flag from the decoder's own config; at the top level it does nothing.
        decoder = config.get_text_config()
        if getattr(decoder, "is_causal", True) is self.bidirectional:  # Also where the checkpoint is an export.
            decoder.is_causal = not self.bidirectional
        self.model, loading = AutoModel.from_pretrained(
            self.checkpoint,
            config=config,
            dtype=self.dtype,
            attn_implementation=self._attention(config),
            quantization_config=_quantization() if self.load_in_4bit else None,
            use_safetensors=True,  # Not the pickles that old checkpoints are.
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # They are refused below, by name.
            **self._source,
        )
        names = [name for name, _ in self.model.named_parameters()]
        self.groups = self.all_groups
        present = {*map(self.group_of, names)}
        self.groups = {group: pattern for group, pattern in self.all_groups.items() if group in present}
        for name in names:
            if re.search(NEVER_READ, name):
                self.model.get_parameter(name).requires_grad_(False)
        problems = {
            "lacks": [*loading["missing_keys"]],
            "has in another shape": [f"{name} {[*saved]}" for name, saved, _ in loading["mismatched_keys"]],
        }
        for problem, names in problems.items():
            if names:
                raise ValueError(
                    f"The checkpoint {self.checkpoint!r} {problem} {_listed(names)}: weights of the model that its "
                    "config.json describes, which would be random. Name a complete checkpoint."
                )
        self._say_what_is_left_out([name for name in loading["unexpected_keys"] if not name.startswith("lm_head.")])

    def _weight_files(self) -> list[str]:
        """Return the paths of the weights; refuse a checkpoint that lacks one of its files, or has a broken one."""
        names = {SAFE_WEIGHTS_NAME}
        if not self._files(SAFE_WEIGHTS_NAME) and (index := self._json(SAFE_WEIGHTS_INDEX_NAME)):
            names = {*index.get("weight_map", {}).values()} or names
        paths = self._files(*sorted(names))
        if lost := names - {Path(path).name for path in paths}:
            raise ValueError(
                f"The checkpoint {self.checkpoint!r} has no {_listed([*lost])}. It needs whole safetensors."
            )
        for path in paths:
            try:
                safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not whole ({error}). Copy or download it again.") from error
        return paths

    def _say_what_is_left_out(self, weights: Sequence[str]) -> None:
        """Say what else a checkpoint has: modules and prompts of an earlier stage, adapters, other weights."""
        left = []
        for module in self._json("modules.json"):
            files = [f"{module['path']}/{name}" for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)]
            if module["path"] and self._files(*files):
                left.append(f"weights of {module['type'].rsplit('.', 1)[-1]} (modules.json)")
        prompts = self._json("config_sentence_transformers.json").get("prompts") or {}
        for role, instruction in self.instructions.items():
            if (prompt := prompts.get(role)) and prompt != instruction:
                left.append(f"the prompt {prompt!r} for a {role}")
        left += [f"an adapter in {path.parent.name}/" for path in Path(self.checkpoint).glob("*/adapter_config.json")]
        if weights:
            left.append(f"weights that its config.json has no place for ({_listed(weights)})")
        if left:
            print_once(
                f"{self.checkpoint} has {', '.join(left)}. They are not loaded: the backbone is loaded, what stands "
                "behind it begins anew."
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
        for path in self._weight_files():
            with safe_open(path, framework="pt") as file:
                if names := {HEAD, THINKER_HEAD} & {*file.keys()}:
                    rows = file.get_slice(names.pop())
                    return torch.stack([rows[token] for token in tokens]).to(self.device, self.model.dtype)
        raise ValueError(
            f"The checkpoint {self.checkpoint!r} has no {HEAD} in safetensors, so there are no logits of yes and no. "
            "Use another score head, such as vlmembed.heads.Linear."
        )

    def embed(self, tokens: Sequence[int]) -> Float[Tensor, "tokens H"]:
        """Return the embeddings of some tokens, as they are being trained."""
        embedded: Tensor = self.model.get_input_embeddings()(torch.tensor(tokens, device=self.device))
        return embedded

    def group_of(self, name: str) -> str:
        """Return the group that a parameter's name falls in."""
        return next(group for group, pattern in self.groups.items() if re.search(pattern, name))

    def vision_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what images go through before they meet the text, with names."""
        groups = ("vision", "merger")
        return (entry for entry in self.named_parameters() if self.group_of(entry[0]) in groups)

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
        """Return what stands at each image's tokens, at every level of the language model that images enter."""
        raise NotImplementedError(f"{type(self).__name__} reads images together with their text.")

    def forward(
        self, inputs: Inputs, layers: Sequence[int] = (-1,), features: Features = (), num_last_tokens: int | None = None
    ) -> Float[Tensor, "*K B L H"]:
        """Return the hidden states of a chunk on any device: (B, L, H), or (K, B, L, H) for K layers.

        Layer -1 is the last one, after the final norm; 0 the token embeddings. ``features`` come from `encode_images`,
        of each image of the batch by its index. States of other tokens than an item's last ones may be NaN.
        """
        # Chunks wait on the host and come over one at a time, so device memory does not grow with the batch.
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        output = self.model(**inputs, use_cache=False, output_hidden_states=tuple(layers) != (-1,))
        states = [output.last_hidden_state if layer == -1 else output.hidden_states[layer] for layer in layers]
        return states[0] if len(states) == 1 else torch.stack(states)


def _quantization() -> BitsAndBytesConfig:
    if not (torch.cuda.is_available() and is_bitsandbytes_available()):
        raise ValueError(
            "load_in_4bit needs a CUDA device and the bitsandbytes package "
            f"(CUDA: {torch.cuda.is_available()}, bitsandbytes: {is_bitsandbytes_available()}). "
            "Install vlmembed[quantization] on a machine with a GPU, or set load_in_4bit: false."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _listed(names: Sequence[str]) -> str:
    """Return the first few names, for a message."""
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
