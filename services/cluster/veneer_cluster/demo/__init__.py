"""The demonstration: a local cluster, the main job from a folder of pictures to an answer, true figures."""
