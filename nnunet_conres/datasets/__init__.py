"""Data sets: conversion of BraTS to nnU-Net's raw format, splits, sparse annotation, and synthetic tumour cases."""
