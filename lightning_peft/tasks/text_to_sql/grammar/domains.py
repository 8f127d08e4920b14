"""The vocabulary of the text-to-SQL schemas: three linked tables for each domain, other domains for each split.

A line is `table: column=values, ...` or `table > parent: ...`. Values: `person`, `thing`, `place`, `code` (a unique
label), `low-high` (integers), `low-high` with decimals (reals), `date`, or `a/b/c` (a category). No table and, apart
from labels, no column of an evaluation domain occurs in a training domain.
"""

TRAIN = """
singer: name=person, country=France/Japan/Peru/Kenya/Canada/Norway, age=18-75, birth_date=date
album > singer: title=thing, genre=rock/jazz/folk/pop/blues, release_year=1970-2023, copies_sold=100-9000
track > album: title=thing, duration=90-420, rating=1.0-9.9, language=English/Spanish/Hindi/Korean

museum: name=place, city=Lyon/Oslo/Porto/Kyoto/Quito, founded_year=1800-1999, ticket_price=3.0-25.0
exhibition > museum: title=thing, theme=nature/war/science/fashion/trade, start_date=date, visitors=200-9000
artwork > exhibition: title=thing, material=bronze/marble/oil/paper/glass, height=0.2-6.0, insured_value=500-90000

school: name=place, district=North/South/East/West/Central, capacity=200-2500, budget=100-9000
teacher > school: name=person, subject=math/history/music/biology/art, salary=2000-7000, hire_date=date
course > teacher: title=thing, credits=1-12, weekly_hours=1-20, term=spring/summer/autumn/winter

restaurant: name=place, cuisine=Thai/Italian/Mexican/Greek/Indian, stars=1-9, seats=12-150
chef > restaurant: name=person, age=20-70, experience=1-40, nationality=Turkish/Polish/Chilean/Irish/Danish
dish > chef: name=thing, price=4.0-60.0, calories=80-1400, course_type=starter/main/dessert/side

team: name=place, league=premier/national/regional/junior/amateur, wins=0-60, founded_year=1890-2015
player > team: name=person, position=guard/forward/center/keeper/winger, age=17-41, height=1.5-2.2
injury > player: body_part=knee/ankle/wrist/back/shoulder, injury_date=date, days_out=1-200, cost=100-9000

company: name=thing, industry=energy/retail/media/mining, revenue=100-9900, headquarters=Berlin/Austin/Mumbai/Nairobi
employee > company: name=person, salary=1500-9500, job_title=analyst/engineer/clerk/manager/lawyer, hire_date=date
laptop > employee: model=code, brand=Orion/Zenith/Pavo/Corvus, memory=4-128, purchase_year=2012-2024

author: name=person, country=Brazil/Egypt/India/Spain/Sweden, birth_year=1900-1995, awards=0-30
book > author: title=thing, genre=crime/fantasy/romance/essay/drama, pages=60-900, price=5.0-70.0
review > book: reviewer=person, score=1-100, review_date=date, words=40-2000

farm: name=place, region=valley/coast/plateau/delta/hills, area=5-900, owner=person
field > farm: name=thing, soil=clay/sand/loam/peat, slope=0.5-20.0, area=1-90
harvest > field: crop=wheat/maize/barley/rice/oats, weight=100-9000, harvest_date=date, quality=1-100

hotel: name=place, city=Rome/Dubai/Lima/Miami/Hanoi, stars=1-9, rooms=10-400
guest > hotel: name=person, nationality=Greek/Finnish/Cuban/Thai/Kenyan, age=18-90, arrival_date=date
payment > guest: amount=20-4000, method=cash/card/check/transfer, payment_date=date, tax=1.0-90.0

zoo: name=place, city=Prague/Durban/Perth/Denver/Cusco, area=2-300, opening_year=1850-2010
cage > zoo: label=code, width=2.0-40.0, habitat=desert/jungle/savanna/tundra/swamp, capacity=1-40
animal > cage: name=thing, weight=1-5000, diet=plants/meat/insects/fish, birth_date=date

bank: name=thing, country=Chile/Malta/Ghana/Latvia/Oman, assets=100-9900, founded_year=1820-2015
branch > bank: name=place, manager=person, employees=3-120, opening_date=date
loan > branch: customer=person, amount=500-90000, interest=0.5-15.0, purpose=house/car/study/business/travel

train: name=thing, operator=Nordbahn/Citylink/Transrail/Metroline, top_speed=80-360, seats=60-900
station > train: name=place, platforms=1-24, region=upper/lower/inner/outer, elevation=1-1900
delay > station: reason=snow/strike/repair/accident, minutes=1-240, delay_date=date, passengers=10-900

shop: name=place, district=harbor/market/castle/garden/station, floor_area=20-900, rent=300-9000
product > shop: name=thing, category=toy/tool/food/book/lamp, price=1.0-300.0, stock=0-500
sale > product: sale_date=date, quantity=1-60, discount=0.5-50.0, channel=web/store/phone/fair

doctor: name=person, specialty=heart/skin/eye/bone/brain, salary=3000-9900, experience=1-45
clinic > doctor: name=place, city=Turin/Osaka/Dakar/Boston/Sofia, beds=2-90, rent=400-9000
nurse > clinic: name=person, shift=day/night/evening/weekend, age=20-66, hourly_wage=9.0-60.0

director: name=person, nationality=French/Korean/Iranian/Danish/Mexican, birth_year=1920-1995, awards=0-40
movie > director: title=thing, genre=comedy/horror/drama/western/thriller, runtime=60-220, budget=100-9900
role > movie: actor=person, pay=50-9000, kind=lead/support/cameo/voice, scenes=1-60

river: name=place, continent=Asia/Africa/Europe/America/Oceania, length=20-6500, depth=1.0-90.0
bridge > river: name=thing, material=steel/stone/wood/concrete, width=2-60, built_year=1700-2020
inspection > bridge: inspector=person, grade=1-100, inspection_date=date, fee=100-5000

ship: name=thing, flag=Panama/Malta/Norway/Greece/Liberia, tonnage=100-9900, built_year=1950-2022
voyage > ship: harbor=place, departure_date=date, distance=50-9000, fuel=10-900
sailor > ship: name=person, rank=captain/mate/cook/deckhand, age=18-65, wage=900-6000

city: name=place, state=Texas/Ohio/Utah/Maine/Iowa, population=500-90000, elevation=1-2400
park > city: name=thing, size=1.0-90.0, benches=2-300, opening_year=1880-2020
tree > park: type=oak/pine/birch/maple/elm, height=1.0-40.0, planting_date=date, circumference=10-400

university: name=place, country=Italy/Ghana/Nepal/Cuba/Iceland, students=500-40000, tuition=100-9900
professor > university: name=person, field=physics/law/economics/logic/geology, age=30-75, citations=10-9000
lecture > professor: title=thing, room=code, attendance=5-400, lecture_date=date

driver: name=person, home_town=Leeds/Ghent/Graz/Bergen/Split, age=18-70, license_year=1970-2020
car > driver: model=code, color=red/blue/white/black/green, mileage=10-9000, price=500-9900
repair > car: garage=place, cost=40-4000, repair_date=date, part=brake/engine/wheel/clutch

game: title=thing, platform=console/mobile/desktop/arcade, price=1.0-80.0, release_year=1985-2024
level > game: name=thing, difficulty=1-100, enemies=0-90, setting=forest/castle/space/ocean
attempt > level: player_name=person, score=10-9000, seconds=20-900, attempt_date=date

painter: name=person, style=cubist/baroque/realist/gothic/modern, birth_year=1400-1980, pupils=0-40
painting > painter: title=thing, color=amber/ivory/crimson/violet, width=0.2-4.0, price=100-9900
auction > painting: house=place, bids=1-90, auction_date=date, final_price=200-9900

gym: name=place, city=Bonn/Cork/Pisa/Tampa/Busan, monthly_fee=10-150, area=50-2000
trainer > gym: name=person, sport=boxing/yoga/rowing/judo/cycling, age=20-60, hourly_rate=15.0-120.0
session > trainer: name=thing, start_date=date, participants=1-40, duration=20-180

factory: name=place, industry=paper/textile/steel/glass/cement, workers=10-900, energy_use=100-9000
machine > factory: code=code, power=1.0-90.0, maker=Bolten/Kramer/Tanaka/Ruiz, purchase_date=date
failure > machine: cause=heat/wear/leak/overload, downtime=1-200, cost=50-9000, failure_date=date

department: name=thing, building=Alpha/Beta/Gamma/Delta, budget=100-9900, floor=1-30
project > department: title=thing, priority=low/normal/high/urgent, start_date=date, cost=100-9000
task > project: name=thing, assignee=person, hours=1-90, status=open/done/blocked/waiting

newspaper: name=thing, language=German/Arabic/French/Danish/Polish, circulation=100-90000, founded_year=1800-2000
journalist > newspaper: name=person, age=22-70, desk=sports/politics/culture/travel, salary=1500-7000
article > journalist: title=thing, words=100-4000, publish_date=date, readers=50-9000

mountain: name=place, country=Nepal/Chile/Kenya/Austria/Turkey, elevation=900-8800, first_ascent_year=1780-1990
hut > mountain: name=thing, beds=4-120, night_price=5.0-90.0, warden=person
hike > hut: guide=person, length=2-60, hike_date=date, group_size=2-30

orchestra: name=place, founded_year=1820-2010, budget=100-9900, conductor=person
musician > orchestra: name=person, instrument=violin/flute/horn/cello/harp, age=19-70, wage=900-7000
concert > orchestra: title=thing, concert_date=date, audience=50-4000, ticket_price=5.0-150.0

house: address=place, style=colonial/cottage/modern/ranch/villa, price=100-9900, built_year=1850-2023
room > house: purpose=kitchen/bedroom/office/bathroom/hall, area=4-80, windows=0-12, height=2.0-5.0
chair > room: model=code, color=brown/gray/yellow/black, weight=1.0-30.0, cost=10-900
"""

VALIDATION = """
apiary: name=place, climate=humid/arid/mild/alpine, hives_total=2-80, yearly_income=100-9900
beekeeper > apiary: name=person, skill=novice/expert/master/skilled, stings=0-300, joined_on=date
hive > beekeeper: label=code, honey_kg=1.0-60.0, bee_count=1000-60000, queen_color=gold/black/tan/striped

castle: name=place, province=Tyrol/Galicia/Saxony/Umbria/Bohemia, towers=1-20, wall_thickness=0.5-6.0
knight > castle: name=person, oath_date=date, battles=0-50, weapon=sword/lance/mace/axe
horse > knight: name=thing, coat=bay/roan/chestnut/dun, gallop_speed=20-70, foaled_year=1300-1450

library: name=place, borough=Soho/Camden/Hackney/Brixton, shelves=20-900, annual_grant=100-9900
librarian > library: name=person, seniority=junior/senior/chief/trainee, certified_on=date, badge_number=100-999
loaned_item > librarian: title=thing, format=atlas/comic/disc/map, late_fee=0.5-20.0, renewals=0-9

volcano: name=place, crater_shape=round/oval/irregular/twin, altitude=300-6800, last_eruption_year=1500-2022
sensor > volcano: code=code, signal=seismic/thermal/gas/acoustic, installed_on=date, battery_level=1-100
alarm > sensor: severity=minor/major/critical/false, magnitude=0.5-9.0, raised_on=date, evacuees=0-9000

toy_maker: name=person, workshop=Elm/Cedar/Birchwood/Ashford, apprentices=0-20, debut_year=1930-2015
puppet > toy_maker: name=thing, strings=1-15, fabric=velvet/cotton/linen/silk, market_worth=10-900
show > puppet: venue=place, staged_on=date, spectators=5-600, applause=1.0-9.9
"""

TEST = """
airline: name=thing, alliance=Skyteam/Oneworld/Starlink/Vanilla, fleet_size=5-400, hub=Doha/Madrid/Seoul/Dallas
flight > airline: code=code, destination=Bogota/Riga/Cairo/Manila/Tunis, boarding_date=date, cabin_crew=2-20
passenger > flight: name=person, fare=40-2000, luggage_kg=1.0-40.0, meal=vegan/kosher/halal/standard

hospital: name=place, county=Kent/Devon/Essex/Surrey/Dorset, wards=2-40, emergency_rooms=1-30
patient > hospital: name=person, diagnosis=asthma/fracture/migraine/anemia, admitted_on=date, pulse=50-140
prescription > patient: drug=thing, dose_mg=5-900, refills=0-12, unit_cost=0.5-90.0

vineyard: name=place, appellation=Rioja/Chianti/Mosel/Douro, hectares=2-200, planted_year=1900-2010
wine > vineyard: label=thing, grape=merlot/riesling/syrah/malbec, alcohol=9.0-16.0, vintage_year=1980-2022
tasting > wine: critic=person, points=50-99, tasted_on=date, bottles_opened=1-40

observatory: name=place, hemisphere=northern/southern/equatorial/polar, domes=1-12, night_hours=500-3500
telescope > observatory: nickname=thing, mirror_size=0.3-12.0, optics=lens/mirror/radio/hybrid, first_light_date=date
sighting > telescope: astronomer=person, object_type=comet/nebula/quasar/pulsar, brightness=1.0-30.0, exposure=5-900

chess_club: name=place, meeting_day=Monday/Tuesday/Friday/Sunday, boards=4-60, membership_fee=5-200
member > chess_club: nickname=person, elo=800-2800, title_held=grandmaster/expert/candidate/none, enrolled_on=date
duel > member: opponent=person, opening=Sicilian/French/English/Slav, moves=10-140, played_on=date

bakery: name=place, quarter=Latin/Gothic/Jewish/Chinese, ovens=1-12, daily_customers=30-900
baker > bakery: name=person, certificate=bronze/silver/gold/platinum, years_worked=1-40, pay_grade=1-15
cake > baker: flavor=lemon/mocha/vanilla/carrot, layers=1-9, sugar_grams=20-900, retail_price=3.0-95.0

podcast: name=thing, topic=finance/parenting/cinema/gardening, subscribers=50-90000, launch_date=date
episode > podcast: headline=thing, downloads=10-9000, length_minutes=5-180, aired_on=date
sponsor > episode: brand_name=thing, sector=telecom/insurance/apparel/software, payout=50-5000, ad_seconds=10-120

submarine: name=thing, navy=British/Russian/Chinese/Indian, max_depth=100-900, commission_year=1955-2022
mission > submarine: codename=thing, ocean=Arctic/Pacific/Atlantic/Baltic, days_submerged=3-200, sailed_on=date
officer > submarine: name=person, duty=sonar/navigation/torpedo/radio, medals=0-15, monthly_pay=1500-9000

theater: name=place, architecture=Tudor/Victorian/Bauhaus/Byzantine, balconies=0-6, stage_depth=4.0-30.0
play > theater: headline=thing, acts=1-7, premiere_date=date, mood=tragic/comic/satirical/absurd
performer > play: name=person, lines_spoken=5-900, costume=robe/armor/gown/mask, stipend=100-4000

mine: name=place, mineral=copper/zinc/cobalt/lithium, shaft_length=50-4000, licensed_year=1900-2020
miner > mine: name=person, helmet_color=orange/teal/pink/navy, overtime=0-80, blood_type=A/B/AB/O
tunnel > mine: tag=code, gradient=0.5-30.0, rail_length=20-900, sealed_on=date

robot: nickname=thing, maker_lab=Helix/Vertex/Quanta/Nimbus, joints=2-40, payload=0.5-200.0
experiment > robot: codename=thing, trials=1-300, success_rate=1.0-99.0, conducted_on=date
sensor_log > experiment: channel_type=lidar/sonar/infrared/tactile, samples=10-9000, noise=0.1-9.0, logged_on=date

festival: name=place, music_style=techno/reggae/opera/swing, stages=1-15, camping_fee=5-120
band > festival: name=thing, origin=Lagos/Dublin/Havana/Memphis, albums_released=0-25, formed_year=1965-2020
gig > band: sound_engineer=person, set_length=20-180, crowd=50-9000, gig_date=date
"""
