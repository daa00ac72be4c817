"""Who runs where, in which order, and what is measured. Imports everything below; nobody imports it.

Floors, top to bottom: commands; session; controller and scaling; roles, evaluation, output; cluster, buffer; config.
"""
