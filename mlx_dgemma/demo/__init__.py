"""The bundled demo: a complete DiffusionGemma in miniature and the tasks it was trained on."""
