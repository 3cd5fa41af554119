"""A picture and a question about it.

python examples/image.py                      the bundled demo model and a picture drawn here
python examples/image.py FOLDER_OR_HUB_ID FILE_OR_URL "What does the sign say?"
"""

import sys

from PIL import Image, ImageDraw

from mlx_dgemma import generate, load

path, picture, prompt = [*sys.argv[1:], None, None, None][:3]
if picture is None:
    picture = Image.new("RGB", (128, 128), (250, 248, 244))
    ImageDraw.Draw(picture).ellipse((10, 10, 54, 54), fill=(208, 32, 32))
    picture.save("picture.png")
    print("see picture.png")
model, tokenizer = load(path)
prompt = prompt or "What is in the picture?"
print(generate(model, tokenizer, prompt, images=[picture], seed=1))
