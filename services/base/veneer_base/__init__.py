"""The demonstration base: a small Qwen3-VL that reads printed office documents, and the renderer it learnt from."""
