"""Qwen3-VL on torch: the one model that training and serving share.

Owns the forward pass, the base's weights, LoRA and the loss. It owns no batching policy, no cache policy, no
optimiser and no preprocessing: a caller hands in token ids, positions and patches (`veneer_processing` makes
them), says how tokens attend to one another (`attention`, `cache`) and which adapters they wear (`lora`).

The legend of tensor names, used all over this package and by everyone who calls it:

    T  tokens of all sequences of a pass, one after another, without padding
    N  chosen tokens among T: those that are supervised, visual, or wanted as logits
    D  hidden width of the decoder          V  vocabulary
    H  query heads    G  key/value heads    K  width of a head
    P  patches of all pictures of a pass    X  values of a patch (channels x frames x rows x columns)
    W  hidden width of the vision tower     M  merged patches: visual tokens (P / merge²)
    L  layers         S  cache slots        C  tokens a slot can hold
    I  inputs of a linear    O  outputs of a linear    R  rank of an adapter
    3  the axes of a position: time, row, column

So `hidden_T_D` has one row a token, and `key_S_C_G_K` holds the keys of every slot.
"""
