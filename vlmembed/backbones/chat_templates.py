"""Chat templates: of pairs, with tokens at their end, and none that drops what it is given."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from vlmembed.limits import in_child

#: What transformers and Sentence Transformers call the template in a folder.
NAME = "reranker"

#: The default instruction of Qwen3-VL-Reranker (arXiv:2601.04720).
RERANKER_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."

#: What the model is told to do, in the words that Qwen3-VL-Reranker was trained with.
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)

SHOW = """\
{%- macro show(role) -%}
    {%- for message in messages if message.role == role -%}
        {%- if message.content is string -%}
            {{- message.content -}}
        {%- else -%}
            {%- for part in message.content -%}
                {%- if part.type == 'text' -%}
                    {{- part.text -}}
                {%- elif part.type in ('image', 'video') -%}
                    {{- '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' -}}
                {%- elif part.type == 'audio' -%}
                    {{- '<|audio_start|><|audio_pad|><|audio_end|>' -}}
                {%- else -%}
                    {{- raise_exception('A content part is a text, image, video or audio, not ' + part.type) -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
"""

#: Chat markup of Qwen. A system message, where there is one, is the instruction.
CHAT = """\
{{- '<|im_start|>system\\n' + %(system)s + '<|im_end|>\\n<|im_start|>user\\n<Instruct>: ' -}}
{{- show('system') or %(instruction)s -}}
%(pair)s
{{- '<|im_end|>\\n' -}}
{%%- if add_generation_prompt -%%}
    {{- '<|im_start|>assistant\\n' -}}
{%%- endif -%%}
"""


class PairTemplate(ABC):
    """How a cross-encoder reads a query and a document."""

    #: Whether a pair ends with its query, so that a pair that is too long cannot be cut at the end.
    ends_with_query = False

    @property
    @abstractmethod
    def source(self) -> str:
        """A chat template in Jinja, for a message of role ``query`` and one of role ``document``."""

    @property
    def origin(self) -> str:
        """What messages call it."""
        return type(self).__name__


class QueryFirst(PairTemplate):
    """The input of Qwen3-VL-Reranker (arXiv:2601.04720): instruction, query, document. Candidates share their query.

    Args:
        instruction: What a document is sought for.
        system: What the model is told to do.
    """

    pair = "{{- '<Query>:' + show('query') + '\\n<Document>:' + show('document') -}}"

    def __init__(self, instruction: str = RERANKER_INSTRUCTION, system: str = JUDGE) -> None:
        self.instruction = instruction
        self.system = system

    @property
    def source(self) -> str:
        """The template, with both texts as strings in Jinja."""
        # A string in JSON, unescaped, is one in Jinja.
        system, instruction = (json.dumps(text, ensure_ascii=False) for text in (self.system, self.instruction))
        return SHOW + CHAT % {"system": system, "instruction": instruction, "pair": self.pair}


class DocumentFirst(QueryFirst):
    """As `QueryFirst`, with the document before the query: queries share a document, and its images.

    Args:
        instruction: What a document is sought for.
        system: What the model is told to do.
    """

    pair = "{{- '<Document>:' + show('document') + '\\n<Query>:' + show('query') -}}"
    ends_with_query = True


class TemplateFile(PairTemplate):
    """A chat template of your own, for other instructions or another checkpoint's markup.

    Args:
        path: A file in Jinja, which renders messages of the roles ``query`` and ``document``, and may render one of
            the role ``system``.
        ends_with_query: Whether the query comes behind the document.
    """

    def __init__(self, path: str, ends_with_query: bool = False) -> None:
        if not Path(path).is_file():
            raise ValueError(f"TemplateFile: {path}: no such file.")
        self.path = path
        self.ends_with_query = ends_with_query

    @property
    def source(self) -> str:
        """The file's content."""
        try:
            return Path(self.path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.origin}: not a text in UTF-8 ({error}).") from error

    @property
    def origin(self) -> str:
        """The class and the path."""
        return f"TemplateFile {self.path}"


TEXT, IMAGE, AUDIO = {"type": "text", "text": "one"}, {"type": "image"}, {"type": "audio"}
LONG_TEXT = {"type": "text", "text": " ".join(map(str, range(20_000)))}

#: What a message may hold: a template may cut long texts, or show the first image alone.
PROBES = ([TEXT], [IMAGE], [LONG_TEXT], SEVERAL := [IMAGE, TEXT, IMAGE])

#: What rendering them may take.
SECONDS, MEMORY = 5, 2**30

#: Renders the content of a message of each role.
Render = Callable[[Mapping[str, Sequence[dict[str, str]]]], str]

_passed: set[Any] = set()  # A process makes many preprocessors of one checkpoint.


def check_template(
    processor: Any, origin: str, roles: Sequence[str], instructions: Iterable[str | None], generation_prompt: bool
) -> None:
    """Refuse a template that leaves out a text or an image of a role, or the instruction before it, or never ends."""

    def render(chat: Mapping[str, Sequence[dict[str, str]]]) -> str:
        messages = [{"role": role, "content": [*content]} for role, content in chat.items()]
        try:
            rendered: str = processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # Of any kind: a template is a program.
            raise ValueError(str(error) if isinstance(error, jinja2.TemplateError) else repr(error)) from error
        return rendered

    key = (type(processor), processor.chat_template, tuple(roles), frozenset(instructions), generation_prompt)
    if key in _passed:
        return
    try:
        hears = getattr(processor, "feature_extractor", None) is not None
        contents = [*PROBES, [AUDIO]] if hears else PROBES
        # It may loop for ever, or fill the memory.
        dropped = json.loads(in_child(partial(_losses, render, roles, instructions, contents), SECONDS, MEMORY))
    except ValueError as error:
        raise ValueError(f"{origin} cannot be rendered for {' and '.join(roles)}: {error}") from error
    if dropped:
        raise ValueError(
            f"{origin} drops {' and '.join(dropped)}: it has to render all texts, images and audio of a message of "
            f"each role of {', '.join(roles)}, and the text of a system message. Mend it; or use "
            "vlmembed.backbones.QueryFirst "
            "for pairs, and set query_instruction and document_instruction to null where it takes no system message."
        )
    _passed.add(key)


def _losses(
    render: Render, roles: Sequence[str], instructions: Iterable[str | None], contents: Iterable[list[dict[str, str]]]
) -> bytes:
    """Return what of messages a template leaves out, in JSON; a ``ValueError`` says why it cannot be rendered."""
    losses = set()
    for instruction, role, content in product(instructions, roles, contents):
        system = {"system": [{"type": "text", "text": instruction}]} if instruction else {}
        chat = {**system, **{key: [TEXT] for key in roles}, role: content}
        try:
            rendered = render(chat)
        except ValueError as error:
            # Refused aloud: an item that has several will be, too.
            if content is SEVERAL and isinstance(error.__cause__, jinja2.TemplateError):
                continue
            raise
        if instruction and instruction.strip() not in rendered:
            losses.add("the system message")
        for index, part in enumerate(content):
            fewer = {**chat, role: content[:index] + content[index + 1 :]}
            if part["text"].strip() not in rendered if "text" in part else render(fewer) == rendered:
                losses.add(f"{part['type']}s of the {role}")
    return json.dumps(sorted(losses)).encode()


#: Returns the learned embeddings (tokens, H). A function, because the tensor may be another one in each step.
TokenEmbeddings = Callable[[], Tensor]


def append_tokens(processor: Any, tokens: Sequence[str], new: bool) -> None:
    """Let a processor's template end with some tokens, which its vocabulary gets where they are new, or has to have."""
    vocabulary = processor.tokenizer.get_vocab()
    if wrong := [token for token in tokens if (token in vocabulary) == new]:
        raise ValueError(
            f"The pooling appends {wrong} to every item, which the checkpoint's vocabulary "
            + ("has already. Rename the pooling's tokens." if new else "does not have. Name a token that it has.")
        )
    if new:
        processor.tokenizer.add_tokens(list(tokens), special_tokens=True)
    if tokens:
        # Jinja itself drops a newline at the end.
        processor.chat_template = processor.chat_template.removesuffix("\n") + "".join(tokens)


def expand_queries(processor: Any, tokens: int | Sequence[str] | None) -> tuple[str, ...]:
    """Let a processor's template end with some tokens, or a number of padding tokens, where ``task`` is ``query``.

    Sentence Transformers gives a template that reads ``task`` the one of the call, which holds for a batch. A batch in
    training holds both, so a message may say its own. Returns the tokens.
    """
    tokenizer = processor.tokenizer
    expansion = (tokenizer.pad_token,) * tokens if isinstance(tokens, int) else tuple(tokens or ())
    if not expansion:
        return ()
    vocabulary, atoms = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    marks = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
    for token in expansion:
        if token not in vocabulary:
            problem = "the checkpoint's tokenizer does not have"
        elif token not in atoms:
            problem = "the tokenizer would split, or join with its neighbours"
        elif token in marks:
            problem = "stands for an image, a video or an audio"
        else:
            continue
        raise ValueError(
            f"expansion_tokens has {token!r}, which {problem}. Name one of its special tokens, such as "
            f"{tokenizer.pad_token!r}, or a number of these."
        )
    string = json.dumps("".join(expansion), ensure_ascii=False)
    # An expression: what stands before a block may lose its white space.
    condition = "task == 'query' or messages[-1].task == 'query'"
    processor.chat_template = processor.chat_template.removesuffix("\n") + f"{{{{ {string} if {condition} else '' }}}}"
    chat = [{"role": "user", "content": [TEXT]}]
    document, query = (processor.apply_chat_template(chat, task=task) for task in ("document", "query"))
    if query != document + "".join(expansion):
        raise ValueError(
            "expansion_tokens: the checkpoint's chat template reads task already, and does something else for a query. "
            "Set expansion_tokens: 0, or begin with a checkpoint whose template does not."
        )
    return expansion


def learn_tokens(model: Any, tokenizer: Any, tokens: Sequence[str], embeddings: TokenEmbeddings) -> None:
    """Let a model, without adapters yet, read learned embeddings where it finds some tokens.

    Its own table gets rows for them, which nobody reads until `write_tokens` fills them.
    """
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    first = tokenizer.convert_tokens_to_ids(tokens[0])

    def replace(_: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        rows = arguments[0] - first  # (…, L); the tokens' ids are the last ones, in order.
        learned = embeddings().to(output.dtype)[rows.clamp(0, len(tokens) - 1)]
        return torch.where((rows >= 0)[..., None], learned, output)

    model.get_input_embeddings().register_forward_hook(replace)


@torch.no_grad()
def write_tokens(model: Any, tokenizer: Any, tokens: Sequence[str], embeddings: TokenEmbeddings) -> None:
    """Write learned embeddings into the model's own table."""
    first = tokenizer.convert_tokens_to_ids(tokens[0])
    table = model.get_input_embeddings().weight
    table[first : first + len(tokens)] = embeddings().to(table)
