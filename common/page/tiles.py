"""Images as HTML, for visdom's panes of text."""

import base64
import io

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image

from common import figures


def tile(image, caption, side, font):
    """An image, uint8 [3, H, W], `side` px wide over its caption, in a font of `font` px, as HTML."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    tag = f"<img src='{source}' style='width:100%;image-rendering:pixelated'>"
    style = f"display:inline-block;vertical-align:top;width:{side}px;margin:2px"
    return f"<div style='{style};font-size:{font}px;line-height:1.1'>{tag}<br>{caption}</div>"


def pattern_tile(pattern, caption, side):
    """A pattern [3, H, W] as a tile, whose caption ends with its scale."""
    image = (255 * figures.pattern_image(pattern)).to(torch.uint8)
    return tile(image, f"{caption}; {figures.describe_scale(pattern)}", side, 11)


def heat_map(values):
    """[h, w] from 0 to the largest value as an image, uint8 [3, h, w] on the CPU; NaN is white."""
    values = values / values.nan_to_num().max().clamp(min=1e-12)
    colors = matplotlib.colormaps["inferno"].with_extremes(bad="white")
    return torch.from_numpy(colors(values.cpu().numpy(), bytes=True)[..., :3]).permute(2, 0, 1)


def to_square(image):
    """[3, h, w] with white below or right of it, where it is no square."""
    _, h, w = image.shape
    return F.pad(image, (0, max(h, w) - w, 0, max(h, w) - h), value=1.0)
