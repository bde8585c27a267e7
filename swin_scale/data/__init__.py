"""The sample stream: from shards on disk to uint8 batches in an order that no worker or rank count can change.

In the order in which a sample meets them: `order` (which sample, when), `reader` (its bytes), `decode` (its pixels),
`augment` and `randaugment` (its random view), `worker` and `loader` (in which process), `streams` (the public face),
and on the device `finish` (normalise, erase) and `mixup`. Files up to `worker` import no torch, so that loader
processes start in a fraction of a second.
"""
