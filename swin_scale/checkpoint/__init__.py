"""Topology-free, pickle-free checkpoints: fragments with global coordinates in safetensors files, one commit."""

from swin_scale.checkpoint.attempts import MAX_ATTEMPTS, LoadAttempts
from swin_scale.checkpoint.manifest import Fragment, Manifest, RankFile
from swin_scale.checkpoint.reader import Checkpoint, list_steps, newest_good, step_directory, verify
from swin_scale.checkpoint.space import SMALL_FILES, checkpoint_bytes, shortage
from swin_scale.checkpoint.store import (
    RankLayout,
    begin,
    best_of,
    commit,
    discard,
    prune,
    rank_layout,
    recover,
    temporary_directory,
    write_rank_file,
)
from swin_scale.checkpoint.tensorfile import load_safetensors, save_safetensors

__all__ = [
    "MAX_ATTEMPTS",
    "SMALL_FILES",
    "Checkpoint",
    "Fragment",
    "LoadAttempts",
    "Manifest",
    "RankFile",
    "RankLayout",
    "begin",
    "best_of",
    "checkpoint_bytes",
    "commit",
    "discard",
    "list_steps",
    "load_safetensors",
    "newest_good",
    "prune",
    "rank_layout",
    "recover",
    "save_safetensors",
    "shortage",
    "step_directory",
    "temporary_directory",
    "verify",
    "write_rank_file",
]
