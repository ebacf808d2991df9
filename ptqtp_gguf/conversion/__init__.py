"""The pipeline: plan, prepare, transcode, verify, publish; output files, their records, the card, the Q4_0 twin."""

from __future__ import annotations

from . import pipeline, shares
from .bf16 import make_bf16, ready_source
from .checking import require_loadable, verify_written
from .export import export_q4_0
from .facts import FLOATS, card_facts
from .loop import Job
from .metadata import complete, source_hash
from .model_card import card
from .modelfile import modelfile_path, write_modelfile
from .output_files import Part, discard, finish, lay_out, share_files
from .pipeline import Conversion, Phase, convert, dry_run, imatrix_of, metadata_of, plan_of
from .records import ConversionJournal, JobRecord, TensorRecord, choices_json, choices_of, require_same, rows_of
from .shares import Share
from .summary import Plan, Summary

__all__ = [
    "FLOATS",
    "Conversion",
    "ConversionJournal",
    "Job",
    "JobRecord",
    "Part",
    "Phase",
    "Plan",
    "Share",
    "Summary",
    "TensorRecord",
    "card",
    "card_facts",
    "choices_json",
    "choices_of",
    "complete",
    "convert",
    "discard",
    "dry_run",
    "export_q4_0",
    "finish",
    "imatrix_of",
    "lay_out",
    "make_bf16",
    "metadata_of",
    "modelfile_path",
    "pipeline",
    "plan_of",
    "ready_source",
    "require_loadable",
    "require_same",
    "rows_of",
    "share_files",
    "shares",
    "source_hash",
    "verify_written",
    "write_modelfile",
]
