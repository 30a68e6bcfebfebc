"""Lists of the words that captions of photographs say, by what they claim, and the words that claim nothing.

The lists are frequent words of Flickr8k's captions, as `captioning.dataset.tokenize` writes them, with some of COCO's.
A word is in one list, in the sense that captions mostly mean: "orange" is a colour. Forms that claim the same of a
picture are joined by `/` and count as one word under the first of them: the forms of a verb, two spellings. Singular
and plural claim different things, so they are two words.
"""

from __future__ import annotations

import functools
import importlib.util
import runpy
from pathlib import Path

LISTS = {
    "colours": """
    red blue green yellow orange pink purple brown black white gray/grey tan blond/blonde beige gold/golden silver
    cream maroon navy turquoise teal violet neon colorful/colourful colored/coloured multicolored/multicoloured
    dark bright striped plaid
    """,
    "counts": """
    one/1 two/2 three/3 four/4 five/5 six/6 seven/7 eight/8 nine/9 ten/10 several many few couple pair group groups
    crowd bunch lot/lots
    """,
    "people": """
    man men woman women boy boys girl girls person people child children kid kids baby babies toddler toddlers guy guys
    lady ladies gentleman male males female females adult adults teen teens teenager teenagers family families mother
    father friend friends couples player players rider riders biker bikers cyclist cyclists bicyclist bicyclists
    motorcyclist motorcyclists skier skiers snowboarder snowboarders skateboarder skateboarders skater skaters surfer
    surfers swimmer swimmers climber climbers hiker hikers runner runners racer racers dancer dancers worker workers
    driver officer officers policeman policemen police soldier soldiers cowboy bride groom clown fisherman catcher
    goalie referee spectators onlookers audience cheerleaders photographer
    """,
    "animals": """
    dog dogs puppy puppies cat cats kitten kittens horse horses bird birds cow cows sheep bull duck ducks goose geese
    swan pigeon pigeons seagull seagulls fish monkey bear bears tiger camel camels goat goats elephant elephants giraffe
    giraffes zebra zebras deer rabbit greyhound greyhounds poodle terrier collie retriever labrador lab shepherd pitbull
    dalmatian animal animals
    """,
    "actions": """
    run/runs/running/ran walk/walks/walking/walked jump/jumps/jumping/jumped leap/leaps/leaping/leaped/leapt
    sit/sits/sitting/sat/seated stand/stands/standing/stood lay/lays/laying lie/lies/lying play/plays/playing/played
    ride/rides/riding/rode hold/holds/holding/held carry/carries/carrying/carried wear/wears/wearing/wore
    look/looks/looking/looked watch/watches/watching/watched smile/smiles/smiling/smiled laugh/laughs/laughing/laughed
    swim/swims/swimming/swam climb/climbs/climbing/climbed fly/flies/flying/flew fall/falls/falling/fell/fallen
    swing/swings/swinging/swung slide/slides/sliding/slid catch/catches/catching/caught throw/throws/throwing/threw
    kick/kicks/kicking/kicked hit/hits/hitting push/pushes/pushing/pushed pull/pulls/pulling/pulled
    chase/chases/chasing/chased race/races/racing/raced pose/poses/posing/posed perform/performs/performing/performed
    splash/splashes/splashing/splashed dance/dances/dancing/danced fight/fights/fighting/fought
    wrestle/wrestles/wrestling/wrestled tackle/tackles/tackling/tackled bite/bites/biting chew/chews/chewing
    lick/licks/licking sniff/sniffs/sniffing shake/shakes/shaking bark/barks/barking dig/digs/digging
    eat/eats/eating/ate drink/drinks/drinking/drank smoke/smokes/smoking cook/cooks/cooking read/reads/reading
    talk/talks/talking/talked sing/sings/singing/sang sleep/sleeps/sleeping/slept rest/rests/resting/rested
    wait/waits/waiting/waited kiss/kisses/kissing/kissed hug/hugs/hugging/hugged waving/waved point/points/pointing
    lean/leans/leaning/leaned kneel/kneels/kneeling crouch/crouches/crouching hang/hangs/hanging/hung
    flip/flips/flipping/flipped dive/dives/diving/dove balance/balances/balancing grind/grinds/grinding
    surf/surfs/surfing ski/skiing skate/skates/skating skateboarding snowboarding biking bicycling hike/hikes/hiking
    drive/drives/driving/drove paddle/paddles/paddling wade/wades/wading cross/crosses/crossing/crossed
    work/works/working fishing shopping
    """,
    "places": """
    beach water ocean sea lake river pond pool stream waterfall fountain wave waves snow ice sand grass field dirt mud
    puddle hill hills mountain mountains cliff rock rocks forest woods tree trees desert park playground yard backyard
    lawn garden street streets road sidewalk path trail track city town building buildings house store shop restaurant
    market room kitchen bathroom bedroom stage stadium court gym bridge dock pier shore steps stairs ramp wall fence sky
    air midair outside outdoors outdoor inside indoors indoor
    """,
    "things": """
    ball balls soccer football basketball baseball tennis frisbee toy toys stick rope bike bikes bicycle bicycles
    motorcycle motorcycles motorbike car cars truck bus train boat boats plane airplane skateboard skateboards snowboard
    surfboard sled skis scooter helmet shirt shirts shorts pants jeans jacket jackets coat coats dress hat hats cap
    sunglasses glasses uniform uniforms suit bag backpack umbrella bench chair table bed couch sofa guitar camera phone
    cellphone book sign flag food bottle cup leash collar
    """,
}
OTHER = "other words"  # of content, in none of the lists

GROUPS = (*LISTS, OTHER)
# form -> (its word, the word's group)
FORMS = {
    form: (forms.partition("/")[0], group)
    for group, text in LISTS.items()
    for forms in text.split()
    for form in forms.split("/")
}


@functools.cache
def stop_words() -> frozenset[str]:
    """Return spaCy's English stop words; its numbers to twelve and words of place such as "front" are among them.

    The file of that list is run by itself: importing spaCy takes seconds and brings PyTorch.
    """
    spacy = importlib.util.find_spec("spacy")
    if spacy is None or spacy.origin is None:
        raise ModuleNotFoundError("No module named 'spacy'", name="spacy")
    return frozenset(runpy.run_path(str(Path(spacy.origin).parent / "lang" / "en" / "stop_words.py"))["STOP_WORDS"])
