// What test_bench_page.py does in the page: the body of an async function, which browser.ask runs.
const bench = window.mmtokBench, found = {}, wait = ms => new Promise(done => setTimeout(done, ms));
const all = (q, at) => [...(at || document).querySelectorAll(q)], one = (q, at) => (at || document).querySelector(q);
const until = async (what, name) => { for (let i = 0; i < 400; i++) { const x = what(); if (x) return x; await wait(25); }
  throw new Error('waited for ' + name); };
const type = (id, text) => { const x = one('#' + id); x.value = text; x.dispatchEvent(new Event('input')); };
const pick = (select, value) => { select.value = value; select.dispatchEvent(new Event('change')); };
const field = (at, label) => one('select', all('label.field', one(at)).find(x => one('span', x).textContent === label));
const radio = (at, value) => one(at + ' input[type=radio][value="' + CSS.escape(value) + '"]').click();
await bench.opened;

// tables
const set = name => all('article.set').find(x => x.dataset.set === name);
const rows = name => all('tbody tr', set(name)).map(r => one('th', r).textContent);
const heads = name => all('thead tr:last-child th', set(name));
const head = (name, title) => heads(name).find(x => one('button span', x).textContent === title);
const sorted = (name, title) => { one('button', head(name, title)).click();
  return [head(name, title).getAttribute('aria-sort'), ...rows(name)]; };
found.sets = all('article.set').map(x => x.dataset.set);
found.first = rows('photos');
found.psnr = [sorted('photos', 'PSNR'), sorted('photos', 'PSNR')];
const fd = bench.tables[0].columns.find(c => c.metric === 'fd_inception').title;
found.fd = [sorted('photos', fd), sorted('photos', fd)];
found.byName = sorted('photos', 'contender');
found.lost = all('td.lost', set('photos')).map(x => [x.textContent, x.title]);
found.best = all('td.best', set('photos')).length;
found.copied = one('[data-copy=markdown]', set('speech')).click() || '';
await until(() => one('#live').textContent.includes('copied'), 'the copy');
found.copied = one('#live').textContent;
type('filter-contenders', 'jpeg, levels=2 -codec');
found.filtered = [rows('photos'), rows('speech')];
type('filter-contenders', '');
type('filter-measures', 'usage');
found.measures = heads('photos').map(x => one('button span', x).textContent);
type('filter-measures', '');
const box = all('.choose label', set('photos')).find(x => x.textContent.startsWith('usage'));
box.click();
found.unticked = heads('photos').length;
box.click();
found.ticked = heads('photos').length;
found.text = Object.fromEntries(['markdown', 'latex', 'csv'].map(f => [f, bench.tableText('speech', f)]));
const stop = all('[data-cell]', set('speech'));
found.stops = stop.filter(x => x.tabIndex === 0).length;
stop.find(x => x.tabIndex === 0).focus();
stop[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown', bubbles: true}));
found.moved = document.activeElement.closest('tr').firstChild.textContent;
all('[data-cell]', set('speech')).find(x => x.firstChild.textContent === '2.10')
  .dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true}));
found.protocol = [one('#protocol').open, one('#protocol').innerText];
one('#protocol .close').click();
found.closed = !one('#protocol').open;

// plots
const labels = () => all('#plot .point').map(x => x.getAttribute('aria-label'));
found.points = labels();
pick(field('#plots', 'Measure'), 'SSIM');
found.other = labels();
found.drawn = {lines: all('#plot .line').length, bands: all('#plot .band').length,
  names: all('#plot .direct').map(x => x.textContent)};
const places = () => all('#plot .line').map(x => x.getAttribute('d')).join();
found.log = places();
radio('#plots', 'linear');
found.linear = places();
one('#plot .point').dispatchEvent(new MouseEvent('click', {bubbles: true}));
found.pointed = one('#protocol').open;
one('#protocol').close();

// pictures
await bench.opened;  // a filter draws the item again
const canvas = name => all('#viewer canvas').find(x => x.dataset.picture === name);
const read = name => { const c = canvas(name), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  const rgb = []; for (let i = 0; i < d.length; i += 4) rgb.push(d[i], d[i + 1], d[i + 2]); return rgb; };
const who = found.first[1];
found.item = one('#viewer').dataset.item;
found.plain = [read('original'), read(who)];
radio('#viewer', 'absolute');
found.absolute = read(who);
radio('#viewer', 'signed');
pick(field('#viewer', 'Gain'), '2');
found.signed = read(who);
radio('#viewer', 'picture');
const wipe = one('#viewer input[type=range]');
wipe.value = 50; wipe.dispatchEvent(new Event('input'));
found.wiped = read(who);
wipe.value = 0; wipe.dispatchEvent(new Event('input'));
const hold = one('#viewer .hold');
hold.dispatchEvent(new KeyboardEvent('keydown', {key: ' ', bubbles: true}));
found.held = read(who);
hold.dispatchEvent(new KeyboardEvent('keyup', {key: ' ', bubbles: true}));
found.released = read(who);
radio('#viewer', '8');
found.zoom = [canvas(who).getBoundingClientRect().width, getComputedStyle(canvas(who)).imageRendering];
const pans = all('#viewer .pan');
pans[1].scrollTo(77, 0);
await until(() => pans[3].scrollLeft > 0, 'panning');
found.panned = pans.map(x => x.scrollLeft);
const map = one('#viewer canvas.codes[data-codes="' + CSS.escape(found.first[1]) + '"]');
found.map = {size: [map.width, map.height], rgba: [...map.getContext('2d').getImageData(0, 0, map.width, map.height).data]};
map.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
found.code = one('#live').textContent;
const options = () => all('#gallery [role=option]').map(x => x.title);
found.asChosen = options();
pick(field('#gallery', 'Worst first by'), 'psnr');
found.worst = options();
pick(field('#gallery', 'of'), who);
found.worstOf = options();

// item by item
found.paired = one('#paired').textContent;
found.header = one('#top').innerText;
found.ofSet = one('.set-protocol', set('photos')).textContent;
found.dots = all('#items-plot .dot').length;
const dot = all('#items-plot .dot.shown')[0];
dot.dispatchEvent(new MouseEvent('click', {bubbles: true}));
await until(() => one('#viewer').dataset.item === dot.dataset.item, 'the item of a dot');

// sounds
pick(field('#gallery', 'Set'), 'speech');
const players = await until(() => { const p = all('#viewer audio'); return p.length === 5 && p; }, 'the players');
await until(() => all('#viewer canvas.spectrogram[data-drawn]').length === 5, 'the spectrograms');
const entry = bench.data.gallery.find(e => e.set === 'speech'), s = bench.spectrogram(entry.original);
found.spectrogram = {columns: s.columns, rows: s.rows, values: [...s.values].map(x => Math.round(x * 1000) / 1000)};
one('#viewer .play').click();
await until(() => players[0].currentTime > 0.15, 'the sound');
const heard = players[0].currentTime;
radio('#viewer', found.speech = rows('speech')[1]);
await until(() => !players[2].paused && players[2].currentTime > heard, 'the switch');
found.ab = {first: players[0].paused, before: heard, after: players[2].currentTime,
  current: one('#viewer .sound.current b').textContent};
found.ab.head = await until(() => { const x = parseFloat(all('#viewer .playhead')[2].style.left);  // moves with the next frame
  return x > 100 * heard / players[2].duration && x; }, 'the playhead');
await players[1].play();
await until(() => players[2].paused, 'the others to stop');
found.playing = players.map(x => !x.paused);
one('#viewer .play').click();
await until(() => players[1].paused, 'the pause');
found.samples = [all('#samples audio').length, all('#samples img').length];
found.missing = one('#missing').innerText;
found.title = document.title;
found.scripts = all('script:not([type])').length;
found.loaded = performance.getEntriesByType('resource').map(x => x.name).filter(x => !/^(data|blob):/.test(x));
found.unnamed = all('button, select, input, audio, img, canvas[role]').filter(x => !(x.textContent || x.ariaLabel
  || x.labels && x.labels.length || x.title || x.getAttribute('aria-label') || x.hasAttribute('alt'))).map(x => x.outerHTML.slice(0, 90));
found.faults = window.faults;
return JSON.stringify(found);
