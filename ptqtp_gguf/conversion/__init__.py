"""The pipeline: plan, prepare, transcode, verify, publish; output files, their records, the card, the Q4_0 twin."""

from __future__ import annotations

from . import pipeline, shares
from .checking import verify_written
from .export import export_q4_0
from .facts import FLOATS, card_facts
from .loop import Job
from .metadata import complete, source_hash
from .model_card import card
from .output_files import Part, discard, finish, lay_out, share_files
from .pipeline import convert, convert_opened, dry_run, imatrix_of, metadata_of, plan_of, ready_source
from .records import choices_of, require_same
from .shares import Share
from .summary import Plan, Summary

__all__ = [
    "FLOATS",
    "Job",
    "Part",
    "Plan",
    "Share",
    "Summary",
    "card",
    "card_facts",
    "choices_of",
    "complete",
    "convert",
    "convert_opened",
    "discard",
    "dry_run",
    "export_q4_0",
    "finish",
    "imatrix_of",
    "lay_out",
    "metadata_of",
    "pipeline",
    "plan_of",
    "ready_source",
    "require_same",
    "share_files",
    "shares",
    "source_hash",
    "verify_written",
]
