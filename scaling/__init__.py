"""The same questions asked of deep models: pretrained weights, activations by name, edits, detection, steering."""

from scaling.bridge.conditioning import condition_on as condition_on
from scaling.bridge.conditioning import null_condition as null_condition
from scaling.bridge.export import save_pretrained as save_pretrained
from scaling.bridge.loading import load_model as load_model
from scaling.bridge.loading import load_pipeline as load_pipeline
from scaling.bridge.nnx import from_nnx as from_nnx
from scaling.bridge.nnx import to_nnx as to_nnx
from scaling.diffusion.denoisers import as_denoiser as as_denoiser
from scaling.diffusion.samplers import Condition as Condition
from scaling.diffusion.samplers import sample as sample
from scaling.measures.codes import codes as codes
from scaling.measures.codes import extract as extract
from scaling.measures.codes import read_images as read_images
from scaling.models.model import Model as Model
from scaling.models.model import encode_text as encode_text
from scaling.models.model import initialize as initialize
from scaling.models.model import vae_decode as vae_decode
from scaling.models.model import vae_encode as vae_encode
from scaling.models.taps import Edit as Edit
from scaling.study.generation import generate as generate
from scaling.study.generation import write_pictures as write_pictures
