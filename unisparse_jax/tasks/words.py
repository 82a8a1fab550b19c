# SPDX-License-Identifier: Apache-2.0
"""Word lists: needle keys (adjective-noun) and plain words to count."""

ADJECTIVES = tuple(
  """
able aged amber ample ancient arctic autumn azure bare basic big bitter bland
blazing blue bold brave breezy brief bright brisk broad bronze busy calm
careful cheerful chilly civil clean clear clever close cloudy cold cool cosmic
cozy crisp crooked curious curly damp dapper daring dark dear deep dense dim
distant dizzy double dry dull dusty eager early earnest easy elder elegant
empty equal exact faint fair famous fancy fast fierce final fine firm flat
fluffy fond formal frank free fresh frosty frozen full funny gentle giant
giddy glad gleaming global golden good grand gray great green happy hardy
harsh hasty heavy hidden hollow honest huge humble hungry icy ideal idle inner
jolly keen kind known large lasting late lazy light little lively local lone
long loud lucky magenta major mellow merry mighty mild minor misty modest mute
narrow neat nimble noble noisy odd old open orange oval pale patient plain
plucky polite proud pure purple quick quiet rapid rare ready red regal rich
rigid robust rocky rough round royal rustic safe salty scarlet secret serene
shaggy sharp shiny short shy silent silver simple single sleepy slim slow
small smart smooth snowy soft solid sour spare spiral square stable steady
steep still stormy strong sturdy subtle sudden sunny super swift tall tame
tart tender thin tidy tiny tired tranquil true upper urban vast velvet violet
vivid wandering warm wary weary wet whole wide wild wise witty wooden yellow
young zealous zesty
""".split()
)

NOUNS = tuple(
  """
acorn actor album anchor apple arrow atlas badge bagel ballad bamboo banjo
barn basin basket beacon beaver bell berry bicycle bird blanket boat book
bottle branch bread breeze bridge brook brush bucket buffer butter button
cabin cable cactus camel camera candle canyon carpet castle cave cedar chair
chalk cherry circle clock cloud clover coast cobra comet compass copper coral
cotton crane creek crow crystal cup curtain daisy dancer deer desert desk
diamond dolphin donkey door dragon drum duck eagle earth echo elbow elm ember
engine falcon farm feather fence fern ferry field finch fish flag flame flower
flute fog forest fox frog galaxy garden gate ginger glacier glass glove goat
goose grape grass guitar hammer harbor harp hawk hazel helmet heron hill honey
horse house island ivory jacket jaguar jasmine jewel kettle key kite ladder
lake lamp lantern leaf lemon letter lily lion lizard llama lobster lotus maple
marble market meadow melon mirror moon moose moss mountain mouse museum needle
nest oak oasis ocean olive onion orchard orchid otter owl oyster paddle palm
panda paper parrot peach pearl pebble pelican pencil pepper piano pigeon
pillow pine planet plum pond pony poppy prairie puppet puzzle rabbit raven
reef ribbon river robin rocket rose saddle sailor salmon sand scarf seal
shadow shark sheep shell ship shore signal sky sloth snail snow sparrow spider
spoon spring squirrel star stone storm stream sugar summit sunset swan table
teapot temple thunder tiger timber toad torch tower train tree trout trumpet
tulip tunnel turtle valley vase village violin wagon walrus water whale wheat
wheel willow window winter wizard wolf wren yak zebra
""".split()
)

# Frequent words of comments and docstrings of the standard library.
WORDS = tuple(
  """
ability able abort about absence absent absolute accept access accesses
account accurate acquire across action active acts actual actually adapted
added adding addition addr address adds adhere adjust advance affect after
again against agree ahead alias align alive allocate allow almost alone along
already also alter although altsep always among amount anchor angle another
anymore anyone anything anyway anywhere apart appear append applied applies
apply approach arch archive area argparse args argument argv arising around
arrange array arrow ascii asked asking aspects asserts assign assume asyncio
asyncore atom atomic attach attempt attr audio auth author avoid awaited aware
away back backlog backward badly bail bare barf barrier base basic basis
became because become been before begin behave behavior behind being belong
below best better between binaries binary binascii bind bisect bits blank
block blow body bogus bool boolean border both bother bound boundary boxes
braces breaking breaks broken brown browse browser buffer bufsize buggy bugs
build buildbot builder built builtin bunch bundled busy button bypass byte
bytecode cache calendar call callable callback caller came cancel cannot
canvas caps capture care careful carry case cast catch catches category caught
cause cell cert certain cflags chain chance change channel char charset check
child children choose chosen chrome chunk claim clang classes classic clause
clean cleanup clear click client clock clone close closer closest closure code
codec collect colon color column combine come comma command comment commit
common commonly comp compact compare compile compiler complain complete
complex compound compress compute concept concrete cond config conform conn
connect consider consist console const constant consume contain content
context control conv convert cookie cope copies copy copyreg core corner coro
correct corrupt cost could count counter couple course cover coverage crash
crashes create creation creator cross csock ctype curdir current curses cursor
custom cvar cycle cyclic dangling darwin data datagram date datetime daylight
days deadline deadlock deal debug debugger decide decimal declare decode
decoder deep default defect define delattr delay delegate delete deletion
deliver delta demand denote depend depth deque derive desc design desired dest
destroy detail detect device dialog died diff differ difflib digest digit
direct directly dirs disable disallow discard discover disk dispatch display
dist distance distinct division divmod docs doctest doctype document does
doing domain done dots dotted double down download dragging draw drive driver
drop dummy dump duration during each early easily easy edge edit editor
editwin effect effort eggs eight either elem element email embed emit emitted
emitting empty emulate enable enclosed encode encoder ended endian ending ends
enforce engine enough ensure enter entire entity entries entry enum environ
epoch equal equality equally errno error escape eval evaluate even event ever
every exact exactly examine example exceed excess exclude exec execute
executor exhaust exist exit exitcode expand expect explicit exponent export
expose expr express extend external extra extract face fact factor factory
fail failure fairly fake fall fallback false family fancy fashion fast faster
fatal fault favor feature feed fetch fewer field figure file filelist fileno
fileobj fill filter final find finder fine finish finishes finite first fits
five fixed fixer fixes fixing fixup flag flist float floor flow flush flushes
fnmatch fobj focus fold folder follow font force forever forget fork form
formal format former forth forward found four fourth fraction fragile fragment
frame free fresh front frozen fstat full fully function further future garbage
gather gencodec general generate generic getopt getpass gets getter getting
give given glibc glob globals goal goes going gone good gotten grab grammar
greater green group guard guess gzip hack half hand handle handler handy hang
happen hard harder harness hash hashable hashes hashlib have head header
heavily height held hello help helper helpful hence here hereby hidden hide
high higher highest hint history hits hitting hold home hook hope host hour
htest huge human icon idea ideal ident identify identity idiom idle ignore
image implicit implied implies imply imported importer imports improve include
incoming increase indeed indent index indexes indicate indices indirect
inferred infinite infinity info inherit init initial inline inner input insert
inside insist inspect inst install instance instead intact integer intended
intent interest interior internal interned internet interp interval into ints
invalid inverse invoke involve issue item iter iterable iterate iterator itorg
itself join json jump junk just keep keyboard keyed keys keyword kill kind
klass know known kwargs label lack lang large larger largest last late later
latter launch layer layout lazy lead leaf leak leap least leave left leftmost
legal less lets letter level lexical liable libc library lies like limit line
linear lineno linesep link linker list listbox listdir listen listener literal
little live load loader local locale locate location lock logged logger
logging logic logical login logs lone long longer longest look lookup loop
lose loss lost lots lower lowest lzma machine macro made mail main mainloop
mainly maintain maintype major make malloc manage manager manner manually many
mapped mapping maps mark marker mask master match matches math matter maximum
maxlen maxsize maybe mean meant measure member memory menu merely merge mess
message meta metadata meth method might mime mimic mind minimal minimize
minimum minor minus minute mirror mismatch missing mistake mixed mixin mixing
mmap mock mode model modern modified modifier modifies modify module modulo
moment month more mostly mouse move movement mtime much multiple must mutable
mutate mutation mutually naive narrow nasty native nature nbytes near nearest
need negative neither nest netloc network never newer newline newly next nice
nicer nine node noise none nonzero normal normally normcase notation note
nothing notice notify null nums object obtain obvious occur occurred octal
offset often okay older omit omitted once ones only onto opcode open opener
operand operate operator opposed opposite optimize option optional opts order
ordinal ordinary orig origin original other ought outcome outer outfile output
outside over overall overflow overhead overlap override owner owns pack
package packet padded padding page pair param parens parent parse parser part
partial passed passes passing password past patch pathlib pattern pause
payload peer pending percent perform perhaps period phase pick pickle pipe
pixel pkgutil place plain plainly platform play please plist plus point
pointer policy poll pool poor popen popped pops popular popup port portable
portion position positive posix possible post power pprint precede precise
prefer prefix prefixes prepare presence present preserve press pretend pretty
prev prevent previous prime print printer prior problem proc proceed process
produce product profile prog program progress project prompt proper properly
property proposed protect proto protocol prove provide proxies proxy public
pure purely push puts putting pyconfig pydoc pyexpat pyshell pysqlite python
pytree query queue quick quiet quit quite quopri quote race raised raises
raising random randomly range rate rather ratio reach reaches read readable
reader readline readonly ready real really reason receive recent recently
record recover recreate recurse recycled redirect redo reduce refactor
refcount refcycle refer referred refleak reflect refuses regex regexp register
registry regrtest regular reject related relative release reliable relies
reload rely remain remember remote removal remove rendered reopen repeat repl
replace reply report repr reprlib request require reserved reset resize
resolve resource resp respect respond response rest restart restore restrict
result resume retain retry returned returns retval reuse reverse revert
rewrite rich right risk robust room root rough roughly round routine rows rule
runner running runpy runs runtests runtime safe said same sample sane sanity
save says scale scan schedule scheme scope screen script scroll search
searches second section secure security seed seeing seek seekable seem seen
segment select selector self send sendfile sense sensible sent sentinel
separate sequence serial series serv serve server session sets setter setting
setup seven several shadow shall shallow shape share shell shift shlex short
shorter shortest should show shown shut shutdown shutil shutting sibling side
sign signal signum silly simple simpler simplest simply simulate since single
site sits size sizeof skip skipped skipping slash slated slave sleep slice
slot slow slower small smaller sock sockaddr socket soft software solely
solution some somehow someone somewhat soon sort source space spam span spawn
spec specific specify speed split sqlite square stable stack stale standard
star starred start startup stat state static status stay stderr stdin stdout
step stick still stop stopped stopping store stream strict strictly string
strip stripped strong strongly struct stub stuck stuff style subclass subdir
subject sublist submit subparts subset subtest subtle subtype success such
suffix suffixes suite super supplied supply support sure symbol symlink syms
sync syntax syscall system table tabs tags tail take taken target task tell
temp tempdir tempfile template term terminal termios test testable testdata
tester testfile text textual than thanks that their them theme then theory
there thing think third this those though thought thread through throw thrown
thus till time timeout timer timezone title together token tokenize told took
tool toplevel total totally touch trace track tracker trailing trans transfer
transp traverse treat tree trick tricky tried tries trigger trip triple
trivial trouble true truly truncate truth trying tuple turn turtle type
typical tzdata ugly umask unable unary unbound under undo unequal unicode
unified union unique unit unittest unix unknown unless unlike unlink unnamed
unneeded unpack unpickle unquoted unset unsigned until unused unusual unwrap
update upon upper urllib urlparse usable usage used useful useless user uses
using usual usually util utility valid validate vals value variable variant
varies various vars vary venv verbose verified verify versa version vertical
very vice view viewer virtual visible visual wait waiter wake wakeup walk want
warn watcher ways weak week weird well were whatever wheel when whence
whenever where whereas whether which white whole whose wide widget width wild
will window winreg wish wishes within without work worker world worry worth
would wrap wrapped wrapper wrapping writable write writer written wrong wrote
year yielded yielding yields your zero zipfile zlib zone zoneinfo
""".split()
)
