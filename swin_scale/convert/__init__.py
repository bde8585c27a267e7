"""Weights in and out: foreign files read safely, fitted to models key by key, written to other formats."""

from swin_scale.convert.fit import fit
from swin_scale.convert.infer import infer_model
from swin_scale.convert.inspection import inspect_path
from swin_scale.convert.load import ModelInfo, judge_weights, load_weights, model_from_weights
from swin_scale.convert.report import Line, Report
from swin_scale.convert.source import open_weights, read_state_dict
from swin_scale.convert.weights import Source, Weights
from swin_scale.convert.write import FORMATS, convert

__all__ = [
    "FORMATS",
    "Line",
    "ModelInfo",
    "Report",
    "Source",
    "Weights",
    "convert",
    "fit",
    "infer_model",
    "inspect_path",
    "judge_weights",
    "load_weights",
    "model_from_weights",
    "open_weights",
    "read_state_dict",
]
