"Temporary: the names of this room where they stood before. The lead removes it."
from .models.hf import *
from .models.hf import fetch_folder, from_hf_config, hf_names, model_card, read_hf_chat, render_chat, to_hf_config

card, fetch, names, read_chat, render = model_card, fetch_folder, hf_names, read_hf_chat, render_chat
from_config, to_config = from_hf_config, to_hf_config
