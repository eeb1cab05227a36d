"""The same questions asked of deep models: pretrained weights, activations by name, edits, detection, steering."""

from scaling.api import Model as Model
from scaling.api import encode_text as encode_text
from scaling.api import initialize as initialize
from scaling.api import vae_decode as vae_decode
from scaling.api import vae_encode as vae_encode
from scaling.bridge import load_model as load_model
from scaling.bridge import load_pipeline as load_pipeline
from scaling.denoisers import as_denoiser as as_denoiser
from scaling.export import save_pretrained as save_pretrained
from scaling.nnx import from_nnx as from_nnx
from scaling.nnx import to_nnx as to_nnx
from scaling.samplers import Condition as Condition
from scaling.samplers import sample as sample
from scaling.taps import Edit as Edit
