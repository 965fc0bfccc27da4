"""Opening of images, videos and audio: the formats that are read, the largest sizes, the way to RGB and to mono.

What files look like to the model, and what Sentence Transformers makes of the same files: data/README.md.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import BaseVideoProcessor
from transformers.utils import requires_backends
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from vlmembed.limits import limit
from vlmembed.types import Frame, LazyImage

#: Raster images that say all there is to see. Among Pillow's others, some have another program interpret the file.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

#: Containers of FFmpeg that hold their frames themselves; a playlist would name other files, or addresses.
CONTAINERS = "asf,avi,flv,gif,matroska,mov,mp4,mpeg,mpegts,ogg,webm"

SOUND = rb"ID3|\xff[\xf1-\xf3\xf9-\xfb]|fLaC|RIFF.{4}WAVE|.{4}ftypM4[AB]|FORM.{4}AIF|#!AMR"
#: What libsndfile decodes, of its many formats: WAV, RF64, W64, FLAC, Ogg (Vorbis, Opus), MP3, AIFF, AU, CAF.
AUDIO = (
    rb"RIFF.{4}WAVE|RF64|riff\x2e\x91\xcf\x11|fLaC|OggS|ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]|FORM.{4}AIF[FC]|\.snd|caff"
)
HEIC = rb".{4}ftyp(hei|hev|m[is]f1(?!.{,48}avif))"
IMAGE = rb"\x89PNG|\xff\xd8\xff|BM|II\*\0|MM\0\*|P[1-7]\s|RIFF.{4}WEBP|\0\0\0\x0cjP|.{4}ftyp(avi[fs]|hei|hev|m[is]f1)"
VIDEO = (
    rb".{4}ftyp(?!avi[fs]|hei|hev|m[is]f1)|.{4}(moov|mdat)|\x1a\x45\xdf\xa3|RIFF.{4}AVI |FLV\x01|\0\0\x01[\xb3\xba]|"
    rb"G.{187}G|OggS|0&\xb2u"
)

#: What a file is, by its first bytes, whatever its name says; and what to do with it.
OTHER_KINDS = {
    rb"%PDF-": "a PDF document. Give it under the key 'pdf': {pdf: FILE, page: 1}",
    rb"8BP[SB]": "a Photoshop file (PSD). Convert it to PNG",
    rb"%!|\xc5\xd0\xd3\xc6": "PostScript (EPS). Convert it to PNG",
    rb"gimp xcf": "a GIMP file (XCF). Convert it to PNG",
    rb"(?i:(<\?xml.{,400}?|<!--.*?-->\s*|<!doctype )?<?svg[\s>])": "a drawing (SVG). Convert it to PNG",
    rb"(?i:(<!--.*?-->\s*)?<(!doctype html|html|head|body))": "a web page (HTML). Download the file that it should be",
    rb"<\?xml": "XML. Convert what it describes to PNG",
    rb"\{\\rtf|\xd0\xcf\x11\xe0|PK\x03\x04.{26}(mimetype|\[Content_Types\]|_rels|word|ppt|xl|docProps)": "an Office "
    "document (DOC, DOCX, PPTX, XLSX, ODT, EPUB, RTF). Convert its pages to PNG",
    rb"AT&TFORM": "a DjVu document. Convert its pages to PNG",
    rb"PK[\x03\x05]|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|(?=.{257}ustar)": "an archive. Unpack it",
    rb"II\*\0.{4}CR|II(RO|U\0)|FUJIFILM|.{4}ftypcrx |FOVb": "a raw photograph. Develop it to JPEG",
    rb"\0\0[\1\2]\0|icns|DDS |qoif|\xff\x0a|\0\0\0\x0cJXL |v/1\x01|#\?R|SIMPLE  =|.{128}DICM|\x01\xda|\xd7\xcd\xc6\x9a|"
    rb"\x01\0\0\0.{36} EMF": "an image of a kind that is not read (ICO, DDS, QOI, JPEG XL, EXR, HDR, FITS, DICOM, SGI, "
    "WMF). Convert it to PNG",
    SOUND: "sound. Give it under the key 'audio'",
    rb"#EXTM3U|\[playlist\]|ffconcat": "a playlist. Name the video file itself",
    rb"version https://git-lfs": "a pointer of Git LFS, not the file itself. Fetch it with git lfs pull",
    rb"SQLite format 3|PAR1|\x7fELF|MZ|\x93NUMPY": "data or a program. Name the file that is meant",
}

#: What Pillow raises on files that are missing, broken, or no images.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


#: Where libsndfile notes that less is there than a header says.
CUT = r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)"


class OtherKindError(ValueError):
    """What a file is that cannot be read, and what to do."""


#: The bytes at the beginning of a file that say of what kind it is.
HEAD = 1024

#: A draft keeps at least this many times the width and the height that it will be resized to.
DRAFT_MARGIN = 2

#: The most pixels that an image file may have: 300 MB once it is decoded to RGB. An A3 page at 600 dpi has 70 million.
MAX_PIXELS = limit("VLMEMBED_MAX_IMAGE_PIXELS", 100_000_000)
#: The most bytes that an image file may have.
MAX_BYTES = limit("VLMEMBED_MAX_IMAGE_BYTES", 2**28)
#: The most pixels that may be taken of a video, all frames together: 6 GB in RGB. 960 frames of Full HD have as many.
MAX_VIDEO_PIXELS = limit("VLMEMBED_MAX_VIDEO_PIXELS", 2_000_000_000)
#: The most bytes that an audio file may have, and the most seconds, as its samples in 32 bits are.
MAX_AUDIO_BYTES = limit("VLMEMBED_MAX_AUDIO_BYTES", 2**28)
MAX_AUDIO_SECONDS = limit("VLMEMBED_MAX_AUDIO_SECONDS", 1800)
#: The fewest seconds of a recording (models make one token of 40 to 80 ms), and the samples a second that one may have.
MIN_AUDIO_SECONDS = 0.05
RATES = range(1000, 192_001)

# Pillow has one limit for the whole process: it warns above it, and refuses above twice as much.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def open_image(file: Path | bytes | memoryview) -> Image.Image:
    """Read the header of an image: nothing is decoded, so a file that is refused takes no memory.

    Raises one of ``UNREADABLE`` if it is above a limit, broken, not there, or of none of ``FORMATS``, whatever its name
    ends in.
    """
    head = head_of(file, MAX_BYTES, "VLMEMBED_MAX_IMAGE_BYTES")
    reason = f"pixels are more than the limit of {MAX_PIXELS:,}; VLMEMBED_MAX_IMAGE_PIXELS sets it"
    _check_kind(head, {VIDEO: "a video. Give it under the key 'video'"})
    formats: tuple[str, ...] = FORMATS
    if re.match(HEIC, head, re.DOTALL):
        try:
            import pillow_heif
        except ImportError as error:
            raise OtherKindError(
                'it is a HEIC photograph. Install what reads it (pip install "vlmembed[heic]"), or convert it to JPEG'
            ) from error
        pillow_heif.register_heif_opener()
        formats = ("HEIF",)
    try:
        image = Image.open(file if isinstance(file, Path) else io.BytesIO(file), formats=formats)
    except Image.DecompressionBombError as error:
        raise ValueError(f"its {reason}") from error
    # DNG, NEF, ARW: the first image of such a TIFF is a preview.
    if image.format == "TIFF" and (image.tag_v2.get(254, 0) & 1 or 50706 in image.tag_v2):  # type: ignore[attr-defined]
        image.close()
        raise OtherKindError("it is a raw photograph. Develop it to JPEG")
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{width:,} × {height:,} {reason}")
    return image


def load_image(
    frame: Frame, origin: str = "", resized: Callable[[int, int], tuple[int, int]] | None = None
) -> Image.Image:
    """Open an image upright and in RGB, transparency on white, as transformers' image processors show it to a model.

    Of an animation that is its first frame. Greys of more bits are scaled by those that the brightest one needs. With
    ``resized`` (from height and width to those that the processor will resize to), a JPEG far above that size is
    decoded at 1/2, 1/4 or 1/8. A ``ValueError`` names the origin and what cannot be read.
    """
    with readable("image", frame, origin):
        opened = frame.render() if isinstance(frame, LazyImage) else frame
        image = opened if isinstance(opened, Image.Image) else open_image(opened)
        if resized is not None and not isinstance(frame, Image.Image):
            _draft(image, resized)
        deep = bool(image.getbands()[1:]) and any(";16" in str(tile) for tile in getattr(image, "tile", ()))
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = _grey(image)
        if image.mode in ("RGBa", "La"):  # Colours times opacity.
            image = image.convert(image.mode.upper())
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if deep and np.asarray(image).max() < 16:
            raise ValueError("of its 16 bits a channel the upper ones, which are read, are black; save it with 8")
        return image


def image_size(frame: Frame, origin: str = "") -> tuple[int, int]:
    """Return width and height in pixels, of no more than a file's header; a ``ValueError`` as of `load_image`."""
    if isinstance(frame, Image.Image):
        return frame.size
    with readable("image", frame, origin):
        if isinstance(frame, LazyImage):
            return frame.size
        with open_image(frame) as image:
            return image.size


def load_video(
    video: Path | bytes | tuple[Frame, ...], processor: BaseVideoProcessor, origin: str = ""
) -> tuple[np.ndarray, VideoMetadata]:
    """Open the frames (F, height, width, 3) of a video that a checkpoint's video processor samples, and no others.

    Video files are decoded with PyAV, to the frames that torchcodec gives Sentence Transformers. A ``ValueError`` says
    that one is missing, is of another kind or cannot be decoded, that frames differ in size, or that they have more
    pixels than the limit.
    """
    samples = getattr(processor, "do_sample_frames", False)
    choose = processor.sample_frames if samples else default_sample_indices_fn
    if isinstance(video, tuple):
        width, height = image_size(video[0], origin)
        # Frames alone have no rate; transformers' processors then assume this one, and warn.
        metadata = VideoMetadata(total_num_frames=len(video), fps=24.0, width=width, height=height)
        with readable("video", video[0], origin):
            metadata.frames_indices = _sample(choose, metadata)
        images = [load_image(video[index], origin) for index in metadata.frames_indices]
        sizes = sorted({image.size for image in images})
        if len(sizes) > 1:
            raise ValueError(
                f"{origin or 'An item'} has a video with frames of different sizes: {sizes[0]} and {sizes[-1]}. "
                "Resize them to one size, or give them as images."
            )
        return np.stack([np.asarray(image) for image in images]), metadata
    requires_backends(load_video, ["av"])
    from av import FFmpegError

    try:
        _check_kind(head_of(video), {IMAGE: "an image. Give it under the key 'image', or several as a list of frames"})
        # An absolute path: FFmpeg takes ``concat:…`` for no file.
        return _decode(video if isinstance(video, bytes) else str(video.absolute()), choose)
    except (*UNREADABLE, FFmpegError, StopIteration) as error:
        raise _unreadable("video", video, origin, error) from error


def _decode(video: str | bytes, choose: Callable[..., np.ndarray]) -> tuple[np.ndarray, VideoMetadata]:
    """Decode the chosen frames of a video, upright. Headers may lie or be silent, so its packets are counted."""
    import av

    def opened() -> Any:
        source = io.BytesIO(video) if isinstance(video, bytes) else video
        return av.open(source, options={"format_whitelist": CONTAINERS})

    with opened() as container:
        stream: Any = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise OtherKindError("it is sound. There is nothing to see in it")
        # An edit list has packets discarded: they are decoded, and not shown.
        packets = [(_time(packet), packet.duration or 0, packet.is_discard) for packet in container.demux(stream)]
        spans = [(start, length) for start, length, discarded in packets if start is not None and not discarded]
        if not spans or (container.format.name.startswith("mov") and len(packets) - 1 < stream.frames):
            raise ValueError(f"it is cut or damaged: of {stream.frames or 'its'} frames {len(spans)} are there")
        times = sorted(start for start, _ in spans)
        duration = float((max(map(sum, spans)) - times[0]) * stream.time_base)
        rate = len(times) / duration if duration else float(stream.base_rate)
    with opened() as container:
        stream = container.streams.best("video")
        stream.thread_type = "AUTO"
        decoded = container.decode(stream)
        first = next(decoded)
        height, width, _ = _upright(first).shape
        metadata = VideoMetadata(len(times), rate, width, height, duration, "pyav")
        metadata.frames_indices = _sample(choose, metadata)
        due = [times[index] for index in metadata.frames_indices]
        frames: list[np.ndarray] = []
        for frame in chain((first,), decoded):
            while len(frames) < len(due) and _time(frame) >= due[len(frames)]:
                frames.append(_upright(frame))
            if len(frames) == len(due):
                return np.stack(frames), metadata
    raise ValueError(f"it is cut or damaged: of {len(due)} frames {len(frames)} can be decoded")


def _time(part: Any) -> Any:
    return part.dts if part.pts is None else part.pts


def _upright(frame: Any) -> np.ndarray:
    """Return a decoded frame (height, width, 3) as its container says that it is to be turned."""
    from av.filter import Graph

    # To RGB in a filter graph, as torchcodec does it: PyAV's own way differs where there are 10 bits or half-frames.
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    graph.push(frame)
    return np.rot90(graph.pull().to_ndarray(), (frame.rotation + 45) // 90)


def _sample(choose: Callable[..., np.ndarray], metadata: VideoMetadata) -> list[int]:
    """Choose frames, and refuse more of them than there is room for, before they are decoded."""
    frames = choose(metadata=metadata).tolist()
    pixels = len(frames) * (metadata.width or 0) * (metadata.height or 0)
    if pixels > MAX_VIDEO_PIXELS:
        raise ValueError(
            f"{len(frames)} frames of {metadata.width:,} × {metadata.height:,} are {pixels:,} pixels, more than the "
            f"limit of {MAX_VIDEO_PIXELS:,}; VLMEMBED_MAX_VIDEO_PIXELS sets it"
        )
    return frames


def load_audio(audio: Path | bytes, rate: int, origin: str = "") -> np.ndarray:
    """Open a recording as (samples,) at a sampling rate: its channels averaged, resampled by soxr.

    These are the numbers of transformers' own loader, where that takes soundfile. A ``ValueError`` names the origin and
    what is missing, damaged, silent because it is empty, of another kind, or above a limit.
    """
    with readable("audio", audio, origin), _open_audio(audio) as file:
        samples = file.read(dtype="float32", always_2d=True).T.mean(axis=0)  # (samples, channels) → (samples,)
        if len(samples) < file.frames:
            raise ValueError(f"it is cut or damaged: of {file.frames:,} samples {len(samples):,} can be decoded")
        if not np.isfinite(samples).all():
            raise ValueError("it has samples that are no finite numbers")
        return _resampled(samples, file.samplerate, rate)


def audio_seconds(audio: Path | bytes, origin: str = "") -> float:
    """Return how long a recording is, of no more than its header; a ``ValueError`` as of `load_audio`."""
    with readable("audio", audio, origin), _open_audio(audio) as file:
        return float(file.frames / file.samplerate)


def encode_audio(samples: Sequence[float], rate: int) -> bytes:
    """Return the samples of one channel as the content of a WAV file, for `load_audio`; nothing is lost of float32."""
    file, channel = io.BytesIO(), np.asarray(samples, np.float32)
    if channel.ndim != 1:
        raise ValueError(f"the samples have {channel.ndim} dimensions")
    _soundfile().write(file, channel, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def medium_of(content: bytes) -> str | None:
    """Tell a recording, a video and a PDF by their first bytes; the key of a cell, or None for what is none of them."""
    patterns = {"audio": AUDIO, "video": VIDEO, "pdf": rb"%PDF-"}
    return next((kind for kind, pattern in patterns.items() if re.match(pattern, content[:HEAD], re.DOTALL)), None)


def _soundfile() -> Any:
    try:
        import soundfile
        import soxr  # noqa: F401
    except ImportError as error:
        raise ImportError('Audio needs soundfile and soxr: pip install "vlmembed[audio]".') from error
    return soundfile


@contextmanager
def _open_audio(audio: Path | bytes) -> Iterator[Any]:
    """Open what is a recording by its content, within the limits by its header."""
    soundfile = _soundfile()
    head = head_of(audio, MAX_AUDIO_BYTES, "VLMEMBED_MAX_AUDIO_BYTES")
    if medium_of(head) != "audio":
        convert = "Convert it to FLAC: ffmpeg -i FILE FILE.flac"
        others = {SOUND: f"sound of a kind that is not read (AAC, AMR, M4A). {convert}"}
        others |= {IMAGE: "an image. Give it under the key 'image'"}
        _check_kind(head, others | {VIDEO: f"a video, or sound in a video's container. {convert}"})
        raise OtherKindError(f"it is none of WAV, FLAC, Ogg, MP3, AIFF, AU, CAF. {convert}")
    # Opened by number: soundfile would go by the ending of a name.
    stream = io.BytesIO(audio) if isinstance(audio, bytes) else os.fdopen(os.open(audio, os.O_RDONLY), "rb")
    with stream, soundfile.SoundFile(stream) as file:
        _check_audio(file)
        yield file


def _check_audio(file: Any) -> None:
    """Refuse a recording by its header: too long, too short, or with less behind it than it says."""
    if file.samplerate not in RATES:
        raise ValueError(f"{file.samplerate:,} samples a second are not between {RATES[0]:,} and {RATES[-1]:,}")
    for declared, present in re.findall(CUT, file.extra_info, re.MULTILINE):
        if int(declared) > int(present) + 8:  # Some writers count a few bytes of the header.
            missing = f"its header says {int(declared):,} bytes, and {int(present):,} are there"
            raise ValueError(f"it is cut or damaged: {missing}")
    seconds = file.frames / file.samplerate
    # Many channels take as much memory as a longer recording.
    if max(seconds, file.frames * file.channels / RATES[-1]) > MAX_AUDIO_SECONDS:
        raise ValueError(
            f"its header says {seconds:,.0f} seconds ({file.frames:,} samples in each of {file.channels} channels), "
            f"more than the limit of {MAX_AUDIO_SECONDS:,}; VLMEMBED_MAX_AUDIO_SECONDS sets it"
        )
    if seconds < MIN_AUDIO_SECONDS:
        raise ValueError(f"its {file.frames} samples are {seconds:.3f} seconds, less than {MIN_AUDIO_SECONDS}")


def _resampled(samples: np.ndarray, source: int, rate: int) -> np.ndarray:
    import soxr

    if source == rate:
        return samples
    count = math.ceil(len(samples) * rate / source)
    resampled = soxr.resample(samples, source, rate, quality="soxr_hq")[:count]
    return np.pad(resampled, (0, count - len(resampled)))


def _draft(image: Image.Image, resized: Callable[[int, int], tuple[int, int]]) -> None:
    """Have libjpeg decode a far too large JPEG at a fraction of its size. Other formats are left as they are.

    Three times as fast. What the model sees differs by 0.1 to 0.5 grey levels of 255 on average (at most 15, in a page
    of text): less than if the file had been saved once more at quality 75.
    """
    width, height = image.size
    target = resized(height, width)
    for scale in (8, 4, 2):
        draft = height // scale, width // scale
        # Where a side does not divide, libjpeg rounds up, and the image would be stretched by part of a pixel.
        exact = (draft[0] * scale, draft[1] * scale) == (height, width)
        large = all(side >= DRAFT_MARGIN * goal for side, goal in zip(draft, target, strict=True))
        if exact and large and resized(*draft) == target:
            image.draft(None, draft[::-1])
            return


def _grey(image: Image.Image) -> Image.Image:
    """Bring greys of more than 8 bits to 8; Pillow would clip them, so that all that is not almost black is white."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" and 0 <= low <= high <= 255:
        greys = values * 255 if high <= 1 else values
    elif image.mode != "F" and low >= 0:
        # A scanner of 10 or 12 bits leaves the upper ones unused: its white is not 65,535.
        unused = 8 - int(high).bit_length()
        greys = values << unused if unused > 0 else values >> -unused
    else:
        raise ValueError(
            f"values from {low} to {high} in mode {image.mode!r} do not say what is white; use 8 or 16 bits"
        )
    grey = Image.fromarray(greys.astype(np.uint8))
    if (hidden := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def head_of(file: Path | bytes | memoryview, most: float = math.inf, variable: str = "") -> bytes:
    """Return the first bytes of a file, unless it has more than the limit that an environment variable sets."""
    size = file.stat().st_size if isinstance(file, Path) else len(file)
    if size > most:
        raise ValueError(f"{size:,} bytes are more than the limit of {most:,}; {variable} sets it")
    if not isinstance(file, Path):
        return bytes(file[:HEAD])
    with file.open("rb") as opened:
        return opened.read(HEAD)


def _check_kind(head: bytes, others: dict[bytes, str]) -> None:
    """Refuse what is of another kind by its first bytes."""
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, kind in (OTHER_KINDS | others).items():
        if re.match(pattern, head, re.DOTALL):
            raise OtherKindError(f"it is {kind}")


@contextmanager
def readable(kind: str, file: Frame, origin: str) -> Iterator[None]:
    """Make what says that a file cannot be read a ``ValueError`` that names its origin."""
    try:
        yield
    except UNREADABLE as error:
        raise _unreadable(kind, file, origin, error) from error


def _unreadable(kind: str, frame: Frame, origin: str, error: Exception) -> ValueError:
    where, name = f"{origin}: " if origin else "", "given as bytes" if isinstance(frame, bytes | memoryview) else frame
    if isinstance(error, OtherKindError):
        return ValueError(f"{where}cannot read the {kind} {name}: {error}, or remove the row.")
    # Where bytes were in memory is another at each run; what `encode` writes of an error is not.
    reason = re.sub(r" <[^<>]* at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")
    return ValueError(f"{where}cannot read the {kind} {name} ({reason}). Replace the file or remove the row.")
