from __future__ import annotations
def pack(model, layers):
    return model
