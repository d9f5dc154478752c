"""The network and what it learns from: backbones, heads, losses, and the face they show to Composer."""
