"""Every name once: how programs rename, join, split and reorder the tensors of a model. The facts are data.

families.json      a row for each type of model: what llama.cpp, mlx-lm, torchtune and others do with its layers
litgpt.json        litgpt's families
diffusion.json     the models' authors' names for diffusion models, and diffusers'
transformers.json  the rules by which transformers renames and converts weights while it loads them (`make names`)
modules.json       the model types of transformers, and their tables of embeddings and Conv1D (`make names`)

families.py        the rows of a family, carried out on the pairs of an adapter; several pairs as one; experts
row_orders.py      the orders of rows: rotary embedding, gate and up, query groups
tensor_parts.py    which entries of stored tensors a converted tensor consists of
table.py           what `transformers.json` and `modules.json` have
architecture.py    the rules for the model that a config describes: a regular expression, and operations
loaded_names.py    the names that stored tensors have in the loaded model
diffusion_layouts.py   the names of a diffusion model in its other layout
"""
