"""Offline tools for shard sets: write, index, verify, repair, stats, sample.

Data passes through the files in this order: ``sources`` (a folder or list becomes a listing of paths and labels),
``images`` (is this file an image we can train on?), ``write`` (listing to tars, with ``tars`` for the format and
``pool`` for the processes), then ``index``, ``verify``, ``repair`` (with ``salvage`` for the judgement), ``stats`` and
``sample`` on what was written or found.
The contract with readers is `swin_scale.shards`. Nothing here imports torch or webdataset, and this file imports
nothing at all, so that the command line starts at once.
"""
