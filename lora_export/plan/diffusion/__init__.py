"""The two layouts of diffusion models: that of their authors, which most trainers and ComfyUI use, and diffusers'."""
