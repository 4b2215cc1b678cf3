"""The network: layers, positions, MLA, DeepSeekMoE, MTP, the decode cache and the whole model."""
