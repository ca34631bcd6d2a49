# SPDX-License-Identifier: Apache-2.0
"""Embeddings of images, handed from encode workers to the engines that use them through a folder that both see."""
