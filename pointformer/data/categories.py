"""Class tables of ADE20K, Cityscapes and COCO, in the order in which models number classes.

The names are the data sets' own, shortened to the first synonym. Cityscapes has its own colors.
"""

from __future__ import annotations

from pointformer.annotations import Category
from pointformer.data.annotations import distinct_color, named_categories

_ADE20K_STUFF = """
0 1 2 3 4 5 6 9 11 13 16 17 21 25 26 28 29 34 40 46 48 51 52 54 59 60 61 63 68 77 79 84 91 94
96 99 100 101 105 106 109 113 114 117 122 128 131 140 141 145
"""
_ADE20K_NAMES = """
wall; building; sky; floor; tree; ceiling; road; bed; window; grass; cabinet; sidewalk; person;
earth; door; table; mountain; plant; curtain; chair; car; water; painting; sofa; shelf; house; sea;
mirror; rug; field; armchair; seat; fence; desk; rock; wardrobe; lamp; tub; rail; cushion; base;
box; column; signboard; chest of drawers; counter; sand; sink; skyscraper; fireplace; refrigerator;
grandstand; path; stairs; runway; case; pool table; pillow; screen door; stairway; river; bridge;
bookcase; blind; coffee table; toilet; flower; book; hill; bench; countertop; stove; palm;
kitchen island; computer; swivel chair; boat; bar; arcade machine; hovel; bus; towel; light; truck;
tower; chandelier; awning; street lamp; booth; tv; plane; dirt track; clothes; pole; land;
bannister; escalator; ottoman; bottle; buffet; poster; stage; van; ship; fountain; conveyer belt;
canopy; washer; plaything; pool; stool; barrel; basket; falls; tent; bag; minibike; cradle; oven;
ball; food; step; tank; trade name; microwave; pot; animal; bicycle; lake; dishwasher; screen;
blanket; sculpture; hood; sconce; vase; traffic light; tray; trash can; fan; pier; crt screen;
plate; monitor; bulletin board; shower; radiator; glass; clock; flag
"""
_COCO_THINGS = """
1:person; 2:bicycle; 3:car; 4:motorcycle; 5:airplane; 6:bus; 7:train; 8:truck; 9:boat;
10:traffic light; 11:fire hydrant; 13:stop sign; 14:parking meter; 15:bench; 16:bird; 17:cat;
18:dog; 19:horse; 20:sheep; 21:cow; 22:elephant; 23:bear; 24:zebra; 25:giraffe; 27:backpack;
28:umbrella; 31:handbag; 32:tie; 33:suitcase; 34:frisbee; 35:skis; 36:snowboard; 37:sports ball;
38:kite; 39:baseball bat; 40:baseball glove; 41:skateboard; 42:surfboard; 43:tennis racket;
44:bottle; 46:wine glass; 47:cup; 48:fork; 49:knife; 50:spoon; 51:bowl; 52:banana; 53:apple;
54:sandwich; 55:orange; 56:broccoli; 57:carrot; 58:hot dog; 59:pizza; 60:donut; 61:cake; 62:chair;
63:couch; 64:potted plant; 65:bed; 67:dining table; 70:toilet; 72:tv; 73:laptop; 74:mouse;
75:remote; 76:keyboard; 77:cell phone; 78:microwave; 79:oven; 80:toaster; 81:sink; 82:refrigerator;
84:book; 85:clock; 86:vase; 87:scissors; 88:teddy bear; 89:hair drier; 90:toothbrush
"""
_COCO_STUFF = """
92:banner; 93:blanket; 95:bridge; 100:cardboard; 107:counter; 109:curtain; 112:door-stuff;
118:floor-wood; 119:flower; 122:fruit; 125:gravel; 128:house; 130:light; 133:mirror-stuff; 138:net;
141:pillow; 144:platform; 145:playingfield; 147:railroad; 148:river; 149:road; 151:roof; 154:sand;
155:sea; 156:shelf; 159:snow; 161:stairs; 166:tent; 168:towel; 171:wall-brick; 175:wall-stone;
176:wall-tile; 177:wall-wood; 178:water-other; 180:window-blind; 181:window-other; 184:tree-merged;
185:fence-merged; 186:ceiling-merged; 187:sky-other-merged; 188:cabinet-merged; 189:table-merged;
190:floor-other-merged; 191:pavement-merged; 192:mountain-merged; 193:grass-merged;
194:dirt-merged; 195:paper-merged; 196:food-other-merged; 197:building-other-merged;
198:rock-merged; 199:wall-other-merged; 200:rug-merged
"""
_CITYSCAPES = """
7 road 128 64 128; 8 sidewalk 244 35 232; 11 building 70 70 70; 12 wall 102 102 156;
13 fence 190 153 153; 17 pole 153 153 153; 19 traffic light 250 170 30;
20 traffic sign 220 220 0; 21 vegetation 107 142 35; 22 terrain 152 251 152; 23 sky 70 130 180;
24 person 220 20 60; 25 rider 255 0 0; 26 car 0 0 142; 27 truck 0 0 70; 28 bus 0 60 100;
31 train 0 80 100; 32 motorcycle 0 0 230; 33 bicycle 119 11 32
"""


def _items(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(";")]


def _coco(text: str, is_thing: bool, first: int) -> tuple[Category, ...]:
    pairs = [item.split(":") for item in _items(text)]
    return tuple(
        Category(int(number), name, is_thing, distinct_color(first + n))
        for n, (number, name) in enumerate(pairs)
    )


def _cityscapes(text: str) -> tuple[Category, ...]:
    table = []
    for item in _items(text):
        number, *name, red, green, blue = item.split()
        color = int(red), int(green), int(blue)
        table.append(Category(int(number), " ".join(name), int(number) >= 24, color))
    return tuple(table)


ADE20K = tuple(
    Category(c.id, c.name, str(n) not in _ADE20K_STUFF.split(), c.color)
    for n, c in enumerate(named_categories(_items(_ADE20K_NAMES), first=1))
)
"""150 classes; ids are the labels in the pictures, 1 to 150."""

COCO = _coco(_COCO_THINGS, True, 0)
"""80 things."""

COCO_PANOPTIC = COCO + _coco(_COCO_STUFF, False, len(COCO))
"""80 things and 53 kinds of stuff."""

CITYSCAPES = _cityscapes(_CITYSCAPES)
"""19 classes with their label ids."""

CITYSCAPES_THINGS = tuple(category for category in CITYSCAPES if category.is_thing)
"""The 8 classes whose objects are scored."""
