"""Topology-free, pickle-free checkpoints: fragments with global coordinates in safetensors files, one commit."""

from swin_scale.checkpoint.manifest import Fragment, Manifest, RankFile
from swin_scale.checkpoint.reader import Checkpoint, list_steps, newest_good, step_directory, verify
from swin_scale.checkpoint.store import begin, commit, discard, prune, temporary_directory, write_rank_file
from swin_scale.checkpoint.tensorfile import load_safetensors, save_safetensors

__all__ = [
    "Checkpoint",
    "Fragment",
    "Manifest",
    "RankFile",
    "begin",
    "commit",
    "discard",
    "list_steps",
    "load_safetensors",
    "newest_good",
    "prune",
    "save_safetensors",
    "step_directory",
    "temporary_directory",
    "verify",
    "write_rank_file",
]
