"""Networks: timm backbones, heads, losses and the Composer model."""
