"""The numbers of the MWPB paper, as printed there; accuracies in percent, radii for images in [0, 1].

TABLES: table -> row -> the values of that table's COLUMNS, in their order; a row's name is that of its recipe. The
paper contradicts itself in places, and so do these numbers: the natural accuracy of MWPB-AT with WRN-34-10 is
86.85 in Table 5 and 86.82 in Tables 2 and 8. Rows that are not here, such as the two-phase controls, are ours.
"""

from __future__ import annotations

ATTACKED = ("natural", "pgd", "cw", "aa")
COLUMNS = {
    "table1": ATTACKED,
    "table2": ATTACKED,
    "table3": ATTACKED,
    "table4": ATTACKED,
    "table5": (*ATTACKED, "spsa"),
    "table6": ("radius",),
    "table7": ("square", "spsa", "pgd_6", "pgd_10", "pgd_12", "aa_l2", "fab"),
    "table8": ("natural", "pgd", "aa"),
}

TABLES: dict[str, dict[str, tuple[float, ...]]] = {
    # CIFAR-10, ResNet-18
    "table1": {
        "at": (84.10, 52.72, 51.80, 47.95),
        "mwpb_at": (83.78, 56.25, 53.02, 49.96),
        "mart": (80.32, 55.15, 49.35, 47.63),
        "mwpb_mart": (82.23, 57.10, 52.57, 49.53),
        "trades": (82.65, 52.82, 51.82, 48.96),
        "mwpb_trades": (82.89, 55.53, 53.04, 50.73),
    },
    # CIFAR-10, WRN-34-10
    "table2": {
        "at": (86.21, 56.12, 54.95, 51.92),
        "mwpb_at": (86.82, 59.18, 57.36, 54.16),
        "mart": (84.17, 58.10, 54.51, 51.11),
        "mwpb_mart": (85.70, 60.65, 56.78, 53.80),
        "trades": (84.70, 56.30, 54.51, 53.06),
        "mwpb_trades": (86.09, 59.10, 57.04, 54.38),
    },
    # SVHN, ResNet-18
    "table3": {
        "at": (92.67, 55.67, 52.92, 45.94),
        "mwpb_at": (91.45, 61.81, 55.89, 49.73),
        "mart": (91.59, 58.78, 52.79, 43.60),
        "mwpb_mart": (91.51, 61.87, 55.11, 48.45),
        "trades": (90.65, 57.27, 53.59, 46.45),
        "mwpb_trades": (90.30, 60.25, 55.03, 50.11),
    },
    # Tiny-ImageNet, ResNet-18
    "table4": {
        "at": (48.83, 23.96, 21.85, 17.91),
        "mwpb_at": (51.21, 25.07, 23.11, 19.75),
        "mart": (46.01, 26.03, 21.78, 19.18),
        "mwpb_mart": (47.39, 27.15, 22.89, 20.51),
        "trades": (49.11, 22.82, 17.79, 16.82),
        "mwpb_trades": (52.12, 24.60, 19.85, 18.15),
    },
    # CIFAR-10, WRN-34-10
    "table5": {
        "mma": (86.29, 57.12, 57.59, 44.52, 59.87),
        "wat": (85.13, 56.63, 53.97, 50.01, 60.75),
        "mail": (86.81, 60.49, 51.45, 47.11, 59.25),
        "mwpb_at": (86.85, 59.18, 57.36, 54.16, 63.07),
        "gairat": (85.41, 60.76, 45.02, 42.29, 52.32),
        "awp": (85.36, 58.04, 55.92, 53.92, 62.57),
        "mwpb_awp": (87.61, 61.56, 58.54, 56.02, 64.11),
        "st": (84.91, 57.52, 55.11, 53.54, 61.34),
    },
    # mean radius in training, at the best epoch
    "table6": {
        "mwpb_at": (0.043,),
        "mwpb_trades": (0.037,),
        "mwpb_mart": (0.039,),
        "mma": (0.047,),
    },
    # the models of Table 2 under more attacks
    "table7": {
        "at": (60.12, 61.05, 64.49, 49.58, 45.29, 58.52, 52.02),
        "mwpb_at": (61.15, 63.07, 67.12, 52.08, 48.81, 61.09, 54.52),
        "mart": (58.74, 58.91, 65.41, 52.31, 48.84, 57.75, 52.18),
        "mwpb_mart": (60.83, 62.02, 67.19, 55.63, 51.96, 60.41, 54.25),
        "trades": (59.16, 61.15, 64.19, 51.92, 48.23, 58.05, 53.59),
        "mwpb_trades": (60.77, 62.19, 65.82, 53.58, 50.11, 60.03, 55.17),
    },
    # MWPB-AT over alpha, CIFAR-10, WRN-34-10
    "table8": {
        "alpha_010": (88.93, 56.25, 51.67),
        "alpha_020": (88.56, 56.85, 51.88),
        "alpha_030": (88.18, 57.80, 52.58),
        "alpha_040": (87.72, 58.11, 52.85),
        "alpha_050": (87.40, 58.78, 53.64),
        "alpha_058": (86.82, 59.18, 54.16),
        "alpha_070": (85.55, 59.12, 54.14),
        "alpha_085": (85.11, 59.39, 54.02),
        "alpha_120": (83.75, 59.69, 53.50),
    },
}

# smallest and largest radius over the training set, CIFAR-10, ResNet-18 (appendix A.3, Figures 2 to 4)
EXTREMES = {
    "mwpb_at": (0.018, 0.055),
    "mwpb_mart": (0.020, 0.0554),
    "mwpb_trades": (0.0225, 0.0471),
}
