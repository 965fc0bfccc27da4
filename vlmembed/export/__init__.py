"""Exporting: a folder that others open, proof that it serves what was trained, a model card, and the upload."""

from vlmembed.export.exporter import Exporter, ModelInfo, SentenceTransformers, refuse_used
from vlmembed.export.hub import PushError, push
from vlmembed.export.verify import ExportError, Verification

__all__ = ["ExportError", "Exporter", "ModelInfo", "PushError", "SentenceTransformers", "Verification", "push"]
__all__ += ["refuse_used"]
