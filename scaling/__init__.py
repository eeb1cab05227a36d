"""The same questions asked of deep models: pretrained weights, activations by name, edits, detection, steering."""

from scaling.api import Model as Model
from scaling.api import encode_text as encode_text
from scaling.api import initialize as initialize
from scaling.api import vae_decode as vae_decode
from scaling.api import vae_encode as vae_encode
from scaling.bridge import load_model as load_model
from scaling.bridge import load_pipeline as load_pipeline
from scaling.conditioning import condition_on as condition_on
from scaling.conditioning import null_condition as null_condition
from scaling.denoisers import as_denoiser as as_denoiser
from scaling.export import save_pretrained as save_pretrained
from scaling.generation import generate as generate
from scaling.generation import write_pictures as write_pictures
from scaling.nnx import from_nnx as from_nnx
from scaling.nnx import to_nnx as to_nnx
from scaling.representation import codes as codes
from scaling.representation import extract as extract
from scaling.representation import read_images as read_images
from scaling.samplers import Condition as Condition
from scaling.samplers import sample as sample
from scaling.taps import Edit as Edit
