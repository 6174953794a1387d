"""The embedded world `pictograms`: small real models in the standard formats, and everything needed to rebuild them."""
