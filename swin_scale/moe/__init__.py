"""Mixture-of-experts layers: gate, dispatch, experts, and what a layer tells of its routing.

A layer is arithmetic plus explicit process groups; `None` is one process. Order of a pass:
`layer.MoEMlp` -> `router.Router` (who goes where) -> `dispatch` (rows to experts and back) -> `experts.Experts`.
Importing this brings no torch, nor does `config`.
"""
