"""What is pasted where: classes of cut-outs, backgrounds and fonts, and which split may use which.

Chosen by eye from the packages that `sources.py` names. Drawings were left out. A class with several cut-outs keeps
one or more of them out of training (``held``); ten classes are not trained at all and stand in evaluation pictures as
strangers, about which "is there a ..." must not be fooled. Backgrounds show no member of a class as far as one can see.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One class.

    Attributes:
        group: what it is mistaken for: a "no" is drawn from the same group half of the time.
        trained: cut-outs, by path in the stamps without ending.
        held: cut-outs that training never shows.
    """

    group: str
    trained: tuple[str, ...]
    held: tuple[str, ...] = ()


def _kinds(group: str, table: str) -> dict[str, Kind]:
    """Lines of ``word: trained ... | held ...``; a line ``in FOLDER`` says where the paths below begin."""
    found, folder = {}, ""
    for line in table.strip().splitlines():
        if line.strip().startswith("in "):
            folder = line.split()[1]
            continue
        word, _, files = line.partition(":")
        trained, _, held = files.partition("|")
        found[word.strip()] = Kind(
            group, *(tuple(f"{folder}/{name}" for name in part.split()) for part in (trained, held))
        )
    return found


CLASSES: dict[str, Kind] = (
    _kinds(
        "bird",
        """
        in animals/birds
        parrot: adelaide-rosella | rainbow-lorikeet
        chicken: hen rooster | chicken_profile
        duck: duck | drake
        penguin: penguin magellanic_penguin | little-penguin
        heron: heron_greatblue | heron_greatblue_flying
        gull: silver-gull | seagull
        guineafowl: helmeted_guineafowl | guineafowl
        crow: crow
        ostrich: ostrich
        peacock: peacock
        owl: owl
        flamingo: pink_flamingo
        pelican: pelican
        pigeon: pigeon
        toucan: tucan
        turkey: turkey
        vulture: vulture
        """,
    )
    | _kinds(
        "sea animal",
        """
        in animals/fish
        fish: bluegroper butterflyfish coraltrout dolphinfish moonwrasse | stripedfish clownfish
        lobster: lobster
        seahorse: seahorse
        in animals/mammals/aquatic
        dolphin: dolphin
        orca: orca
        otter: otter
        seal: sea_lion
        """,
    )
    | _kinds(
        "small animal",
        """
        in animals
        frog: amphibians/frog | amphibians/frog-1
        fly: insects/fly
        grasshopper: insects/grasshopper
        hornet: insects/hornet
        mantis: insects/mantis
        moth: insects/xanthia
        iguana: lizards/iguana
        rabbit: mammals/rodents/rabbit mammals/rodents/rabbit-2 | mammals/rabbit_little
        beaver: mammals/rodents/beaver
        squirrel: mammals/rodents/squirrel
        ferret: mammals/ferret
        """,
    )
    | _kinds(
        "large animal",
        """
        in animals/mammals
        chimpanzee: apes/chimp
        gorilla: apes/gorilla
        bear: bears/bear | bears/european-bear
        cow: bovines/cow | bovines/cow_white
        gnu: bovines/gnu-stand bovines/gnu-baby | bovines/gnu-sitting bovines/gnu-baby-stand
        goat: bovines/goat | bovines/mountaingoat
        sheep: bovines/sheep bovines/ram | bovines/sheep_lamb
        yak: bovines/yak
        camel: camel/camel | camel/dromedary
        lion: cats/lion | cats/lion-2
        tiger: cats/tiger | cats/tiger_sumatran
        deer: deer/deer deer/wapiti deer/caribou | deer/doe
        dog: dogs/dog | dogs/dingo
        fox: dogs/fox
        elephant: elephant
        donkey: equines/donkey | equines/donkey_eating
        horse: equines/horse
        zebra: equines/zebra
        giraffe: giraffe
        pig: pig pig_golden2 | pig_golden
        rhino: rhino_black
        in animals/marsupials
        kangaroo: kangaroo
        koala: koala
        """,
    )
    | _kinds(
        "food",
        """
        in food/fruit
        apple: apple_fuji apple_red apple_granny_smith | apple_green apple_sierra_beauty
        apricot: apricot | Apricot_whole
        strawberry: Strawberry2 | strawberry
        orange: orange orange_seville | mandarine
        avocado: avocado
        banana: banana
        kiwi: kiwi
        lemon: lemon
        pear: pear
        pineapple: pineapple
        raspberry: raspberry
        in food/vegetables
        broccoli: broccoli
        carrot: carrot
        eggplant: eggplant
        garlic: garlic | garlics
        lettuce: lettuce | redlettuce
        mushroom: mushroom | ../../plants/mushrooms/cep-2 ../../plants/mushrooms/cep
        onion: onion
        pepper: pepper | yellowpepper
        potato: potato
        pumpkin: pumpkin_small
        tomato: tomato
        in food/nuts
        almond: almond
        """,
    )
    | _kinds(
        "plant",
        """
        in plants/flowers
        flower: flower1 flower2 flower3 flower5 flower6 flower8 anemone_red pigface | flower9 red-gazania rose
        in plants/trees
        pinecone: pinecone
        in seasonal/christmas
        wreath: xmaswreath
        """,
    )
    | _kinds(
        "tool",
        """
        in household
        hammer: tools/hammer | tools/mallet_metal
        wrench: tools/wrench tools/wrench_adjustable | tools/wrench_plumbers
        saw: tools/saw
        spade: tools/spade
        toolbox: tools/toolbox
        paintbrush: tools/paintbrush_large
        scissors: arttools/scissors_small_open | arttools/scissors_small_closed
        bin: garbagecan wheelie_bin | home_compost_bin
        bulb: Lightbulb
        kettle: kettle
        key: key
        toilet: toilet
        mug: dishes/mug
        pitcher: dishes/pitcher_small
        teapot: dishes/teapot
        in seasonal
        candle: candle
        cane: christmas/Candy_cane_photo_1 | christmas/Candy_cane_photo_2
        pie: christmas/Mince_Pie
        """,
    )
    | _kinds(
        "leisure",
        """
        in hobbies
        binoculars: binoculars
        camera: camera_35mm
        trumpet: music/brass/trumpet
        drum: music/percussion/drum_tomtom_floor
        violin: music/string/violin
        in hobbies/music/string
        guitar: guitar_classical guitar2 guitar_electric | guitar_electric_bass
        in sports
        ball: basketball soccer cricketball | tennis_ball
        football: football | australian_rules_football
        racket: tennis_racket
        trophy: trophy_cup
        """,
    )
    | _kinds(
        "vehicle",
        """
        in vehicles
        car: auto/beetle auto/sedan | auto/sportscar2
        truck: garbagetruck emergency/firetruck | construction/dumper
        bus: masstransit/green_korean_bus
        plane: flight/planes/747 | ../military/vehicles/f22_raptor
        balloon: flight/balloon360
        tricycle: cycle/pink_tricycle
        boat: ship/chineseJunk | ship/walnutBoat
        wheel: 7spoke256 | wheel_tractor
        mailbox: ../town/usps_mailbox | ../town/uk_post_box
        tank: ../military/vehicles/ww2_german_gun | ../military/vehicles/bradley
        """,
    )
)

STRANGERS = (
    "animals/birds/crowned_crane",
    "animals/birds/lark",
    "animals/mammals/badger",
    "animals/mammals/echidna",
    "animals/mammals/bovines/bison",
    "animals/marsupials/wombat",
    "animals/mammals/rodents/capybara",
    "food/fruit/pomegranate",
    "food/fruit/grapes",
    "hobbies/music/wind/bassoon",
    "medical/stethoscope",
    "space/spacewalk",
)
"""Cut-outs of classes that no question names."""

UNCOUNTED = {"strawberry", "raspberry", "guineafowl", "scissors", "binoculars", "broccoli", "garlic", "lettuce"}
UNCOUNTED |= {"fly", "trophy"}
"""Without a plural that is the word and an ending."""
PLURALS = {"fish": "fish", "sheep": "sheep", "deer": "deer"}


def plural(word: str) -> str:
    """Of a class that is counted."""
    if word in PLURALS:
        return PLURALS[word]
    return word + ("es" if word.endswith(("s", "x", "ch", "sh", "tato", "mato")) else "s")


# ---------------------------------------------------------------------------------------------------------- backgrounds

_MONUMENTS = "gcompris/src/activities/explore_monuments/resource"
_SORTED = "gcompris/src/activities/categorization/resource/images"


def _under(folder: str, names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}.webp" for name in names.split())


BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "train": (
        *_under(f"{_MONUMENTS}/egypt", "bentPyramid greatPyramidOfGiza meidumPyramid redPyramid"),
        *_under(
            f"{_MONUMENTS}/france",
            "arlesAmphitheater chateaudeChambord citedeCarcassonne eiffelTower montStMichel palaisdesPapes pontduGard "
            "reimsCathedral rocamadour",
        ),
        *_under(
            f"{_MONUMENTS}/germany",
            "aulaPalatina berlinCathedral neuschwansteinCastle schwerinPalace trierImperialBaths",
        ),
        *_under(
            f"{_MONUMENTS}/india",
            "ajantaCave charminar gatewayofIndia goldenTemple greatStupa hawaMahal konarkSunTemple mysorePalace "
            "qutubMinar rangGhar victoriaMemorial",
        ),
        *_under(f"{_SORTED}/monuments", "leaningTowerOfPisa zimniPalace"),
        *_under(f"{_SORTED}/renewable", "dam2 solar1 solar3 solar4 solar7 windmill windmill7 windmill14"),
        *_under(f"{_SORTED}/others", "igloo"),
    ),
    "validation": (
        *_under(
            f"{_MONUMENTS}/usa",
            "canyondeChelly castillodeSanMarcos castleClinton fortSumter georgeWashingtonBirthplace lincolnMemorial "
            "mountRushmore navajo",
        ),
        *_under(f"{_SORTED}/renewable", "dam3 windmill12"),
    ),
    "evaluation": (
        *_under(f"{_MONUMENTS}/wonders", "colosseum greatWallofChina machuPicchu petra"),
        "wallpapers/Wine_by_Jakkub_Mede.jpg",
        "wallpapers/aitzgorri_by_Aitzol_Berasategi.jpg",
        "wallpapers/life_by_Aitzol_Berasategi.jpg",
        "wallpapers/picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "wallpapers/sunset_by_Aitzol_Berasategi.jpg",
        "opencv/data/aero1.jpg",
        "opencv/data/building.jpg",
        "opencv/data/home.jpg",
        "opencv/data/leuvenA.jpg",
        "opencv/data/rubberwhale1.png",
        "opencv/hfs/data/001.jpg",
        "opencv/hfs/data/002.jpg",
        "opencv/reg/home.png",
        "opencv/text/scenetext04.jpg",
    ),
}
"""Pictures by package and path. Those of training and validation are public domain, CC0 or CC-BY."""

# ---------------------------------------------------------------------------------------------------------------- fonts

FONTS: dict[str, tuple[str, ...]] = {
    "train": (
        *("liberation:LiberationSans-Regular", "liberation:LiberationSans-Bold", "liberation:LiberationSerif-Regular"),
        *("liberation:LiberationSerif-Bold", "liberation:LiberationMono-Regular", "dejavu:DejaVuSans"),
        *(
            "dejavu:DejaVuSans-Bold",
            "dejavu:DejaVuSerif",
            "dejavu:DejaVuSansMono",
            "lato:Lato-Regular",
            "lato:Lato-Bold",
        ),
        *("roboto:Roboto-Regular", "roboto:Roboto-Bold", "roboto:RobotoCondensed-Bold", "cabin:Cabin-Regular"),
        *("carlito:Carlito-Regular", "carlito:Carlito-Bold", "caladea:Caladea-Regular", "comfortaa:Comfortaa-Bold"),
    ),
    "validation": ("quicksand:Quicksand-Bold", "quicksand:Quicksand-Medium"),
    "evaluation": ("opensans:OpenSans-Regular", "opensans:OpenSans-Bold", "play:Play-Regular", "play:Play-Bold"),
}
"""By short name of the package and file name without ending."""
