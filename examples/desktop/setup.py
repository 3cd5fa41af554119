"""py2app's configuration of the example; not run by us, as we have no Mac.

pip install py2app && python setup.py py2app
"""

from setuptools import setup

setup(
    name="Canvas",
    version="0.1.0",
    app=["canvas_app/__main__.py"],
    options={
        "py2app": {
            # Whole folders, not a zip: they hold the demo model and MLX's compiled kernels.
            "packages": ["mlx", "mlx_dgemma", "tokenizers", "huggingface_hub"],
            "excludes": ["torch", "transformers", "mlx_lm", "lm_eval"],
            "plist": {
                "CFBundleIdentifier": "org.example.canvas",
                "LSMinimumSystemVersion": "14.0",  # MLX's
                "NSHighResolutionCapable": True,
            },
        }
    },
)
