/* The benchmark's page. All texts of a run enter the document as text nodes or attributes, never as markup. */
'use strict';
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($('data').textContent);
  const SVG = $('svg').namespaceURI;
  const ARROWS = {higher: '↑', lower: '↓', neither: ''};
  const MARKS = ['circle', 'square', 'triangle', 'diamond', 'down', 'cross'];
  const COLOURS = 8;
  const ORIGINAL = data.original;
  const MANY = 14; // columns that a table starts with at most, and labels that a plot bears

  // --- small helpers ---------------------------------------------------------------------------------------------

  function build(node, attributes, kids) {
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
      else if (key === 'css') for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
      else if (['checked', 'value', 'disabled', 'hidden', 'selected'].includes(key)) node[key] = value;
      else node.setAttribute(key, value === true ? '' : value);
    }
    node.append(...kids.flat().filter((kid) => kid !== null && kid !== undefined && kid !== false));
    return node;
  }
  const h = (tag, attributes, ...kids) => build(document.createElement(tag), attributes, kids);
  const s = (tag, attributes, ...kids) => build(document.createElementNS(SVG, tag), attributes, kids);
  const number = (x) => (x === null || x === undefined ? null : x === 'inf' ? Infinity : x === '-inf' ? -Infinity
    : x === 'nan' ? NaN : Number(x));
  const finite = (x) => x !== null && Number.isFinite(x);
  const natural = new Intl.Collator('en', {numeric: true, sensitivity: 'base'}).compare;
  const unitOf = (unit) => (unit && unit !== '1' ? unit : '');
  const button = (text, onclick, more) => h('button', {type: 'button', onclick, ...more}, text);
  const say = (text) => { $('live').textContent = text; };

  function decimals(values) {
    const sizes = values.filter((x) => finite(x) && x !== 0).map(Math.abs).sort((a, b) => a - b);
    const middle = sizes[sizes.length >> 1];
    if (!middle || values.every((x) => !finite(x) || Number.isInteger(x))) return 0;
    return middle >= 1000 ? 0 : middle >= 100 ? 1 : middle >= 1 ? 2 : Math.min(8, 2 - Math.floor(Math.log10(middle)));
  }
  function show(x, digits) {
    if (x === null || x === undefined) return '–';
    if (Number.isNaN(x)) return 'nan';
    if (!Number.isFinite(x)) return x > 0 ? '∞' : '−∞';
    const text = x.toFixed(digits === undefined ? decimals([x]) : digits);
    return text.replace('-', '−');
  }
  // Comma: or. Space: and. A minus before a word: not.
  function matcher(text) {
    const choices = text.toLowerCase().split(',').map((t) => t.split(/\s+/).filter(Boolean)).filter((t) => t.length);
    return (name) => !choices.length || choices.some((words) => words.every((word) => word.length > 1
      && word[0] === '-' ? !name.toLowerCase().includes(word.slice(1)) : name.toLowerCase().includes(word)));
  }
  // One stop for Tab in a set of many: the arrow keys go on from there.
  function roving(holder, selector, step) {
    const all = () => [...holder.querySelectorAll(selector)].filter((x) => !x.closest('[hidden]'));
    holder.addEventListener('focusin', (event) => {
      const at = event.target.closest(selector);
      if (!at) return;
      for (const x of holder.querySelectorAll(selector + '[tabindex="0"]')) x.setAttribute('tabindex', '-1');
      at.setAttribute('tabindex', '0');
    });
    holder.addEventListener('keydown', (event) => {
      const at = event.target.closest(selector);
      const move = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1]}[event.key];
      if (!at || !move || event.altKey || event.ctrlKey || event.metaKey) return;
      const next = step ? step(at, move) : all()[all().indexOf(at) + move[0] + move[1]];
      if (next) { event.preventDefault(); next.focus(); }
    });
    holder.restart = () => { const x = all()[0]; if (x) x.setAttribute('tabindex', '0'); };
  }
  function choice(label, options, onchange, value) {
    const select = h('select', {onchange: () => onchange(select.value)},
      options.map((o) => (Array.isArray(o) ? o : [o, o])).map(([v, text]) => h('option', {value: v}, text)));
    if (value !== undefined) select.value = value;
    const node = h('label', {class: 'field'}, h('span', {}, label), select);
    node.select = select;
    return node;
  }
  function check(label, checked, onchange) {
    const input = h('input', {type: 'checkbox', checked, onchange: () => onchange(input.checked)});
    const node = h('label', {class: 'tick'}, input, h('span', {}, label));
    node.input = input;
    return node;
  }
  let groups = 0;
  function radios(label, options, value, onchange) {
    const name = `group-${groups++}`;
    const node = h('fieldset', {class: 'segments'}, h('legend', {}, label), options.map(([v, text]) => h('label', {},
      h('input', {type: 'radio', name, value: v, checked: v === value, onchange: () => onchange(v)}),
      h('span', {}, text))));
    node.set = (v) => { for (const i of node.querySelectorAll('input')) i.checked = i.value === v; };
    return node;
  }
  async function copy(text, what) {
    try { await navigator.clipboard.writeText(text); } catch {
      const area = h('textarea', {class: 'unseen', value: text});
      document.body.append(area);
      area.select();
      document.execCommand('copy');
      area.remove();
    }
    say(`${what} copied`);
  }
  function tip(lines, x, y) {
    const box = $('tip');
    box.replaceChildren(...lines.map((line, i) => h(i ? 'span' : 'b', {}, line)));
    box.hidden = false;
    const {width, height} = box.getBoundingClientRect();
    box.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
    box.style.top = `${y + height + 22 > innerHeight ? Math.max(4, y - height - 12) : y + 14}px`;
  }
  const untip = () => { $('tip').hidden = true; };
  function tipped(node, lines) { // a point's words, for a pointer and for the keyboard
    node.setAttribute('aria-label', lines.join(', '));
    node.addEventListener('pointerenter', (e) => tip(lines, e.clientX, e.clientY));
    node.addEventListener('pointerleave', untip);
    node.addEventListener('focus', () => {
      const box = node.getBoundingClientRect();
      if (node.matches(':focus-visible')) tip(lines, box.right, box.bottom);
    });
    node.addEventListener('blur', untip);
  }

  // --- what the run says -----------------------------------------------------------------------------------------

  const text = (at) => (at === null ? null : data.pool[at]);
  function protocolOf(at) {
    const flat = data.protocols[at], found = {};
    for (let i = 0; i < flat.length; i += 2) found[data.pool[flat[i]]] = data.pool[flat[i + 1]];
    return found;
  }
  const family = (contender) => data.families[contender];
  const tables = data.tables.map((table, index) => {
    const columns = table.columns.map((c) => {
      const column = {...c, cells: new Map(), label: (c.task ? c.task + ' · ' : '') + c.title,
        about: `${c.task || ''} ${c.part} ${c.metric} ${c.title} ${c.unit}`};
      for (const [row, value, low, high, count, interval, reason, protocol, mark] of c.cells) {
        column.cells.set(table.rows[row], {value: number(value), low: number(low), high: number(high), count,
          interval: text(interval), reason: text(reason), protocol, best: mark % 2 === 1, odd: mark > 1,
          contender: table.rows[row], column, table: table.name});
      }
      column.values = [...column.cells.values()].map((cell) => cell.value);
      return column;
    });
    // Level by level there are many: they wait behind their boxes.
    for (const c of columns) c.shown = columns.length <= MANY || !/\[\d+\]/.test(c.metric);
    return {...table, index, columns, sort: null};
  });
  // Bits a pixel, or a second in kbit/s, or an item: whichever the run has first.
  const SCALES = {bitrate_bps: [0.001, 'kbit/s']};
  function rateOf(table) {
    const metric = data.rates.find((m) => table.columns.some((c) => c.metric === m && c.values.some(finite)));
    const c = table.columns.find((x) => x.metric === metric);
    if (!c) return null;
    const [scale, unit] = SCALES[metric] || [1, c.unit];
    return {unit, of: (contender) => { const cell = c.cells.get(contender); return cell && finite(cell.value) ? cell.value * scale : null; }};
  }
  const directionOf = new Map();
  for (const t of tables) for (const c of t.columns) if (!c.task) directionOf.set(`${t.name}\n${c.metric}`, c);
  const titles = new Map(tables.flatMap((t) => t.columns.map((c) => [c.metric, c.title])));
  const titled = (metric) => titles.get(metric) || metric;
  const contenders = [...new Set(tables.flatMap((t) => t.rows))];
  const families = [...new Set(contenders.filter((c) => c !== ORIGINAL).map(family))];
  const colourOf = (f) => `var(--c${families.indexOf(f) % COLOURS})`;
  const markOf = (f) => MARKS[families.indexOf(f) % MARKS.length];
  const dashOf = (f) => ['', '6 4', '2 3', '9 3 2 3'][Math.floor(families.indexOf(f) / COLOURS) % 4];
  const filters = {contender: () => true, measure: () => true, intervals: true};
  const redraw = [];

  function flat(value, path, found) {
    if (value && typeof value === 'object' && !Array.isArray(value)) {
      for (const [k, v] of Object.entries(value)) flat(v, path ? `${path}.${k}` : k, found);
    } else found.push([path, Array.isArray(value) ? value.map((v) => (v && typeof v === 'object'
      ? JSON.stringify(v) : String(v))).join(', ') : String(value)]);
    return found;
  }
  const facts = (pairs) => h('dl', {class: 'facts'},
    pairs.map(([k, v]) => h('div', {}, h('dt', {}, k), h('dd', {}, v))));
  // What all numbers of a table share is the set's protocol, the rest is the number's own.
  function shared(table) {
    if (table.shared) return table.shared;
    const all = [...new Set(table.columns.flatMap((c) => [...c.cells.values()].map((cell) => cell.protocol)))];
    const found = new Map(all.length ? flat(protocolOf(all[0]), '', []) : []);
    for (const at of all) {
      const other = new Map(flat(protocolOf(at), '', []));
      for (const [k, v] of found) if (other.get(k) !== v) found.delete(k);
    }
    table.shared = [...found];
    return table.shared;
  }

  // Of a set as the run says it; of tasks, and of runs that do not say it, what all their numbers share.
  const protocolOfSet = (table) => {
    const told = (data.run.sets || {})[table.name];
    return told ? flat(told, '', []) : shared(table);
  };

  function openProtocol(cell) {
    const {column: c} = cell, dialog = $('protocol');
    const all = protocolOf(cell.protocol), common = shared(tables.find((t) => t.name === cell.table));
    const same = new Set(common.map(([k]) => k));
    const unit = unitOf(c.unit);
    const head = [['measure', c.metric], ['value', cell.reason ? 'not run' : `${show(cell.value, c.digits + 2)} ${unit}`.trim()]];
    if (cell.reason) head.push(['why', cell.reason]);
    if (cell.low !== null) head.push(['95 % interval', `${show(cell.low, c.digits + 2)} to ${
      show(cell.high, c.digits + 2)} ${unit}`]);
    if (cell.interval) head.push(['interval by', cell.interval]);
    head.push(['unit', c.unit === '1' ? '1 (a plain number)' : c.unit], ['better', c.direction],
      ['count', String(cell.count)], ['part', c.part]);
    if (cell.odd) head.push(['remark', 'measured under another protocol than most of its column']);
    dialog.replaceChildren(
      h('div', {class: 'bar'}, h('h2', {id: 'protocol-title'}, `${c.label} of ${cell.contender}`),
        button('Close', () => dialog.close(), {class: 'close'})),
      h('p', {class: 'dim'}, `on ${cell.table}`), facts(head),
      h('h3', {}, 'Protocol of this number'), facts(flat(all, '', []).filter(([k]) => !same.has(k))),
      common.length ? h('h3', {}, 'The same for every number of the table') : null, common.length ? facts(common) : null,
      button('Copy as JSON', () => copy(JSON.stringify({contender: cell.contender, set: cell.table, metric: c.label,
        value: cell.value, low: cell.low, high: cell.high, count: cell.count, not_run: cell.reason, unit: c.unit,
        protocol: all}, null, 1), 'Protocol')));
    dialog.showModal();
    dialog.scrollTop = 0;
  }

  function header() {
    const cells = tables.flatMap((t) => t.columns.flatMap((c) => [...c.cells.values()]));
    const missing = cells.filter((c) => c.reason).length;
    const run = data.run;
    const items = Object.values(data.items).reduce((n, i) => n + i.keys.length, 0);
    const of = (n, one, many) => `${n} ${n === 1 ? one : many}`;
    const measured = [of(contenders.filter((c) => c !== ORIGINAL).length, 'contender', 'contenders'),
      of(tables.filter((t) => !t.task).length, 'set', 'sets'), of(items, 'item', 'items'),
      of(new Set(tables.flatMap((t) => t.columns.map((c) => c.label))).size, 'measure', 'measures'),
      of(cells.length - missing, 'number', 'numbers')].join(', ');
    const rows = [['Measured', measured + (missing ? `; ${missing} not run, with the reasons below` : '')]];
    const when = [run.started, run.finished].filter(Boolean).map((x) => String(x).replace('T', ' ').replace('+00:00', ' UTC')).join(' to ');
    if (when) rows.push(['When', when]);
    const line = (v) => (v && typeof v === 'object' ? flat(v, '', []).map(([k, x]) => `${k} ${x}`).join(', ') : String(v));
    const list = (v) => (Array.isArray(v) ? v : v ? [v] : []);
    for (const m of list(run.machines)) rows.push(['Machine', line(m)]);
    if (run.versions) rows.push(['Versions', line(run.versions)]);
    for (const c of list(run.commands)) rows.push(['Command', h('code', {}, line(c))]);
    $('top').append(facts(rows));
    if (data.remarks.length) $('top').append(h('div', {class: 'remark', id: 'remarks'},
      h('b', {}, 'What this page leaves out'), h('ul', {}, data.remarks.map((r) => h('li', {}, r)))));
    const everything = h('details', {ontoggle: () => { if (everything.children.length < 2) everything.append(facts(flat(run, '', []))); }},
      h('summary', {}, 'All settings of the run')); // of many contenders they are many: built when looked at
    if (Object.keys(run).length) $('top').append(everything);
  }

  function bar() {
    const field = (label, placeholder, id, set) => {
      const input = h('input', {type: 'search', placeholder, id, autocomplete: 'off', spellcheck: 'false',
        oninput: () => { set(matcher(input.value)); for (const f of redraw) f(id); }});
      return h('label', {class: 'field'}, h('span', {}, label), input);
    };
    const links = [...document.querySelectorAll('main > section:not([hidden])')].map((section) =>
      h('a', {href: `#${section.id}`}, section.querySelector('h2').textContent));
    $('bar').append(h('div', {class: 'links'}, links), h('div', {class: 'fields'},
      field('Contenders', 'words, comma = or, -word = not', 'filter-contenders', (m) => { filters.contender = m; }),
      field('Measures', 'psnr, usage …', 'filter-measures', (m) => { filters.measure = m; }),
      check('intervals', true, (on) => {
        filters.intervals = on;
        document.body.classList.toggle('no-intervals', !on);
      })));
  }

  // --- tables ----------------------------------------------------------------------------------------------------

  const columnsOf = (table) => table.columns.filter((c) => c.shown && filters.measure(c.about + ' ' + c.label));

  function rowsOf(table) {
    const rows = table.rows.filter((r) => filters.contender(r));
    if (!table.sort) return rows;
    const {by, dir} = table.sort;
    if (by === 'name') return rows.sort((a, b) => dir * natural(a, b));
    const value = (r) => { const cell = by.cells.get(r); return cell ? cell.value : null; };
    const lost = (x) => x === null || Number.isNaN(x); // not run: last, whichever way
    return rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (lost(x) || lost(y)) return lost(x) - lost(y);
      return x === y ? 0 : dir * (x < y ? -1 : 1);
    });
  }

  function tableBlock(table) {
    const holder = h('div', {class: 'scroll', tabindex: '0', role: 'region', 'aria-label': `Table of ${table.name}`});
    const counts = h('p', {class: 'dim counts'});
    const choose = h('details', {class: 'choose'}, h('summary', {}, 'Choose measures'));
    const block = h('article', {class: 'set', 'data-set': table.name}, h('h3', {}, table.name, ' ',
      h('small', {}, table.modality)), h('details', {class: 'set-protocol'}, h('summary', {}, 'Protocol of this set'),
      facts(protocolOfSet(table)), h('p', {class: 'dim'}, 'Click a number for all that it depends on.')),
    choose, h('div', {class: 'tools'}, ['Markdown', 'LaTeX', 'CSV'].map((format) =>
      button(`Copy ${format}`, () => copy(tableText(table.name, format.toLowerCase()), `${table.name} as ${format}`),
        {'data-copy': format.toLowerCase()})), counts), holder);

    const parts = [...new Set(table.columns.map((c) => c.part))];
    for (const part of parts) {
      const own = table.columns.filter((c) => c.part === part), boxes = [];
      const bases = new Map(); // usage[0], usage[1] ... behind one box
      for (const c of own) {
        const base = (c.task ? c.task + ' · ' : '') + c.metric.replace(/\[\d+\]/, '[ ]');
        bases.set(base, [...(bases.get(base) || []), c]);
      }
      for (const [base, members] of bases) {
        boxes.push(check(members.length > 1 ? `${base} × ${members.length}` : base, members[0].shown, (on) => {
          for (const c of members) c.shown = on;
          draw();
        }));
        boxes[boxes.length - 1].members = members;
      }
      const all = (on) => { for (const b of boxes) { b.input.checked = on; for (const c of b.members) c.shown = on; } draw(); };
      choose.append(h('fieldset', {class: 'boxes'}, h('legend', {}, part), boxes,
        own.length > 1 ? [button('all', () => all(true)), button('none', () => all(false))] : null));
    }

    let head = [], body = null, cellAt = new Map();
    function sortBy(by) {
      const first = by !== 'name' && by.direction === 'higher' ? -1 : 1; // the best comes first, then the worst
      table.sort = table.sort && table.sort.by === by ? {by, dir: -table.sort.dir} : {by, dir: first};
      order();
      say(`${table.name} sorted by ${by === 'name' ? 'contender' : by.label}, ${
        table.sort.dir > 0 ? 'ascending' : 'descending'}`);
    }
    function order() {
      const shown = rowsOf(table);
      body.replaceChildren(...shown.map((r) => body.rowsByName.get(r)));
      for (const th of head) {
        const on = table.sort && table.sort.by === th.by;
        if (on) th.setAttribute('aria-sort', table.sort.dir > 0 ? 'ascending' : 'descending');
        else th.removeAttribute('aria-sort');
      }
      counts.textContent = `${shown.length} of ${table.rows.length} contenders, ${columnsOf(table).length} of ${
        table.columns.length} measures`;
      body.restart();
    }
    function cellOf(c, contender) {
      const cell = c.cells.get(contender);
      if (!cell) return h('td', {class: 'none', title: 'no result of this in the run'}, '·');
      cellAt.set(cell.key = `${table.index}/${c.part}/${c.label}/${contender}`, cell);
      const title = cell.reason || `${cell.value} ${unitOf(c.unit)}; ${cell.odd ? 'another protocol than most of the column; ' : ''}click for the protocol`;
      const interval = cell.low !== null && cell.low !== cell.high && !cell.reason
        ? h('small', {}, `${show(cell.low, c.digits)} … ${show(cell.high, c.digits)}`) : null;
      return h('td', {class: cell.reason ? 'lost' : cell.best ? 'best' : null, tabindex: '-1', title, 'data-cell': cell.key},
        cell.reason ? 'not run' : show(cell.value, c.digits) + (cell.odd ? ' †' : ''), interval);
    }
    function draw() {
      const columns = columnsOf(table);
      cellAt = new Map();
      const heading = (by, label, more) => {
        const th = h('th', {scope: 'col', class: by === 'name' ? 'name' : null}, button('', () => sortBy(by),
          {title: by === 'name' ? 'sort by name' : `${by.part} ${by.task || ''} ${by.metric}: ${by.direction === 'neither'
            ? 'neither way is better' : by.direction + ' is better'}; click to sort`}), more);
        th.firstChild.append(h('span', {}, label), h('span', {class: 'sorted', 'aria-hidden': 'true'}));
        th.by = by;
        return th;
      };
      head = [heading('name', 'contender'), ...columns.map((c) => heading(c, c.label, h('small', {},
        [unitOf(c.unit), ARROWS[c.direction]].filter(Boolean).join(' ') || '\u00a0')))];
      const spans = [];
      for (const c of columns) {
        if (spans.length && spans[spans.length - 1][0] === c.part) spans[spans.length - 1][1] += 1;
        else spans.push([c.part, 1]);
      }
      let before = null;
      columns.forEach((c, i) => { if (c.part !== before) head[i + 1].classList.add('first'); before = c.part; });
      const firsts = head.map((th) => th.classList.contains('first'));
      const open = (e) => {
        const at = e.target.closest('[data-cell]');
        if (!at || (e.key && e.key !== 'Enter' && e.key !== ' ')) return;
        e.preventDefault();
        openProtocol(cellAt.get(at.dataset.cell));
      };
      body = h('tbody', {onclick: open, onkeydown: open}); // cells take the focus themselves: thousands of buttons are slow
      body.rowsByName = new Map(table.rows.map((r) => {
        const cells = columns.map((c, i) => {
          const td = cellOf(c, r);
          if (firsts[i + 1]) td.classList.add('first');
          return td;
        });
        return [r, h('tr', {class: r === ORIGINAL ? 'original' : null}, h('th', {scope: 'row', class: 'name'}, r), cells)];
      }));
      roving(body, '[data-cell]', (at, [x, y]) => {
        let td = at;
        for (;;) {
          const row = y ? (y > 0 ? td.parentNode.nextElementSibling : td.parentNode.previousElementSibling) : td.parentNode;
          td = row && row.cells[td.cellIndex + x];
          if (!td || td.tagName !== 'TD') return null;
          if (td.matches('[data-cell]')) return td;
        }
      });
      holder.replaceChildren(h('table', {role: 'grid', 'aria-label': `${table.name}; Enter opens the protocol of a number`}, h('thead', {}, h('tr', {class: 'parts'}, h('td', {class: 'name'}),
        spans.map(([part, n]) => h('th', {scope: 'colgroup', colspan: n, class: 'first'}, part))), h('tr', {}, head)), body));
      order();
    }
    redraw.push((by) => (by === 'filter-contenders' ? order() : draw()));
    draw();
    return block;
  }

  // The visible table as text; figures as shown, and in CSV as stored.
  function tableText(name, format) {
    const table = tables.find((t) => t.name === name);
    const columns = columnsOf(table), rows = rowsOf(table);
    const range = (c, cell) => (filters.intervals && cell.low !== null && cell.low !== cell.high
      ? ` [${show(cell.low, c.digits)}, ${show(cell.high, c.digits)}]` : '');
    if (format === 'csv') {
      const quote = (x) => (/[",\r\n]/.test(x) ? `"${x.replaceAll('"', '""')}"` : x);
      const lines = [['contender', ...columns.flatMap((c) => {
        const title = `${c.part} ${c.label}${unitOf(c.unit) ? ` (${c.unit})` : ''}`;
        return filters.intervals ? [title, `${title} low`, `${title} high`] : [title];
      })]];
      for (const r of rows) {
        lines.push([r, ...columns.flatMap((c) => {
          const cell = c.cells.get(r);
          const value = !cell ? '' : cell.reason ? 'not run' : String(cell.value);
          const ends = cell ? [cell.low, cell.high].map((x) => (x === null ? '' : String(x))) : ['', ''];
          return filters.intervals ? [value, ...ends] : [value];
        })]);
      }
      return lines.map((line) => line.map((x) => quote(String(x))).join(',')).join('\r\n') + '\r\n';
    }
    const latex = format === 'latex';
    const escape = latex
      ? (x) => x.replace(/[\\{}$&#%_^~<>]/g, (c) => ({'\\': '\\textbackslash{}', '^': '\\^{}', '~': '\\~{}',
        '<': '\\textless{}', '>': '\\textgreater{}'}[c] || `\\${c}`))
      : (x) => x.replace(/[\\|`*_<>[\]]/g, (c) => `\\${c}`).replace(/\s+/g, ' ');
    const arrow = (c) => (latex ? {higher: ' $\\uparrow$', lower: ' $\\downarrow$'}[c.direction] || ''
      : ARROWS[c.direction] ? ` ${ARROWS[c.direction]}` : '');
    const heads = ['contender', ...columns.map((c) => escape(c.label + (unitOf(c.unit) ? ` (${c.unit})` : '')) + arrow(c))];
    const maths = (x) => (latex ? x.replaceAll('−', '-').replaceAll('∞', '$\\infty$') : x);
    const lines = rows.map((r) => [escape(r), ...columns.map((c) => {
      const cell = c.cells.get(r);
      if (!cell) return '–';
      if (cell.reason) return 'not run';
      const value = maths(show(cell.value, c.digits));
      return (cell.best ? (latex ? `\\textbf{${value}}` : `**${value}**`) : value) + (cell.odd ? (latex ? '$^\\dagger$' : ' †') : '') + maths(range(c, cell));
    })]);
    if (latex) {
      return `\\begin{tabular}{l${'r'.repeat(columns.length)}}\n\\toprule\n${heads.join(' & ')} \\\\\n\\midrule\n${
        lines.map((l) => l.map((x) => x.replace('–', '--')).join(' & ') + ' \\\\').join('\n')}\n\\bottomrule\n\\end{tabular}\n`;
    }
    const row = (x) => `| ${x.join(' | ')} |\n`;
    return row(heads) + row(heads.map((_, i) => (i ? '---:' : '---'))) + lines.map(row).join('');
  }

  // --- plots -----------------------------------------------------------------------------------------------------

  function ticks(min, max, log, few) {
    const found = [];
    if (log) {
      for (let e = Math.floor(Math.log10(min)); e <= Math.ceil(Math.log10(max)); e++) {
        for (const m of max / min > 200 ? [1] : max / min > 30 ? [1, 3] : [1, 2, 3, 5]) {
          const t = m * 10 ** e;
          if (t >= min * 0.999 && t <= max * 1.001) found.push(Number(t.toPrecision(3)));
        }
      }
      if (found.length > 1) return found;
    }
    found.length = 0;
    const raw = (max - min) / few, unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((x) => x >= raw * 0.999);
    for (let t = Math.ceil(min / step - 1e-9) * step; t <= max + step * 1e-6; t += step) found.push(Number(t.toPrecision(12)));
    return found;
  }
  function span(values, log) {
    let min = Math.min(...values), max = Math.max(...values);
    if (log) { const pad = Math.max((max / min) ** 0.06, 1.05); return [min / pad, max * pad]; }
    const pad = (max - min) * 0.07 || Math.abs(max) * 0.1 || 1;
    return [min - pad, max + pad];
  }
  function axes(holder, {x, y, height, right, title}) {
    const width = Math.max(300, holder.clientWidth || 900), left = 58, top = 14, bottom = 46;
    const scale = ({min, max, log}, a, b) => (v) => a + (b - a) * (log ? Math.log(v / min) / Math.log(max / min)
      : (v - min) / (max - min));
    const sx = scale(x, left, width - right), sy = scale(y, height - bottom, top);
    const g = s('g', {});
    const label = (list) => { const n = Math.max(...list.map((t) => (String(t).split('.')[1] || '').length)); return (t) => show(t, Math.min(n, 6)); };
    const tx = ticks(x.min, x.max, x.log, Math.max(3, (width - left - right) / 90)), ty = ticks(y.min, y.max, false, 5);
    const lx = x.log ? (t) => String(t) : label(tx), ly = label(ty);
    for (const t of ty) g.append(s('line', {class: 'grid', x1: left, x2: width - right, y1: sy(t), y2: sy(t)}),
      s('text', {x: left - 8, y: sy(t) + 4, 'text-anchor': 'end'}, ly(t)));
    for (const t of tx) g.append(s('line', {class: 'grid', x1: sx(t), x2: sx(t), y1: top, y2: height - bottom}),
      s('text', {x: sx(t), y: height - bottom + 18, 'text-anchor': 'middle'}, lx(t)));
    g.append(s('line', {class: 'axis', x1: left, x2: width - right, y1: height - bottom, y2: height - bottom}),
      s('text', {class: 'title', x: (left + width - right) / 2, y: height - 6, 'text-anchor': 'middle'}, x.label),
      s('text', {class: 'title', transform: `translate(14 ${(top + height - bottom) / 2}) rotate(-90)`,
        'text-anchor': 'middle'}, y.label));
    const svg = s('svg', {class: 'plot', width, height, viewBox: `0 0 ${width} ${height}`, role: 'group', 'aria-label': title}, g);
    return {svg, sx, sy, width, height, left, top, bottom: height - bottom, right: width - right};
  }
  const OUTLINES = {square: 'M-4.5-4.5h9v9h-9z', triangle: 'M0-5.6 5.4 4.2H-5.4z', diamond: 'M0-6 6 0 0 6-6 0z',
    down: 'M0 5.6 5.4-4.2H-5.4z', cross: 'M-5-2h3v-3h4v3h3v4h-3v3h-4v-3h-3z'};
  function mark(kind, x, y, attributes) {
    return kind === 'circle' ? s('circle', {cx: x, cy: y, r: 5, ...attributes})
      : s('path', {d: OUTLINES[kind], transform: `translate(${x} ${y})`, ...attributes});
  }

  function plots() {
    const usable = tables.filter((t) => rateOf(t));
    if (!usable.length) return;
    const state = {set: usable[0].name, log: true, bands: true, measure: null};
    const holder = h('div', {class: 'plot-holder', id: 'plot'}), note = h('p', {class: 'dim'});
    const measures = h('span', {class: 'slot'});
    const table = () => usable.find((t) => t.name === state.set);
    const options = () => table().columns.filter((c) => !data.rates.includes(c.metric) && c.values.some(finite));
    function choose() {
      const judged = (c) => [...c.cells.values()].some((cell) => cell.low !== null); // item by item, so with intervals
      if (!options().some((c) => c.label === state.measure)) state.measure = (options().find(judged) || options()[0] || {}).label;
      measures.replaceChildren(choice('Measure', options().map((c) => [c.label, `${c.label} (${c.part})`]), (v) => {
        state.measure = v;
        draw();
      }, state.measure));
    }
    function draw() {
      untip();
      const c = table().columns.find((x) => x.label === state.measure);
      if (!c) { holder.replaceChildren(); return; }
      const rate = rateOf(table()), left = [], points = [];
      for (const [contender, cell] of c.cells) {
        if (contender === ORIGINAL || !filters.contender(contender)) continue;
        const at = rate.of(contender);
        if (finite(cell.value) && at > 0) points.push({contender, cell, x: at, y: cell.value, family: family(contender)});
        else left.push(`${contender} (${cell.reason || (at ? show(cell.value) : 'no rate')})`);
      }
      note.textContent = (left.length ? `Not drawn: ${left.slice(0, 6).join('; ')}${left.length > 6 ? ` and ${left.length - 6} more` : ''}. ` : '')
        + 'Lines join the rates of one tokenizer; bands and bars are 95 % intervals; a click opens the protocol.';
      if (!points.length) { holder.replaceChildren(h('p', {class: 'dim'}, 'No number of this to draw.')); return; }
      const original = c.cells.get(ORIGINAL), level = original && finite(original.value) ? original.value : null;
      const bars = (p) => (state.bands && finite(p.cell.low) && finite(p.cell.high) ? [p.cell.low, p.cell.high] : []);
      const [x0, x1] = span(points.map((p) => p.x), state.log);
      const [y0, y1] = span([...points.flatMap((p) => [p.y, ...bars(p)]), ...(level === null ? [] : [level])]);
      const byFamily = new Map();
      for (const p of points) byFamily.set(p.family, [...(byFamily.get(p.family) || []), p]);
      const narrow = holder.clientWidth < 620, labelled = !narrow && byFamily.size <= 2 * MANY;
      const longest = Math.max(...[...byFamily.keys()].map((f) => f.length));
      const unit = unitOf(c.unit);
      const a = axes(holder, {height: 440, right: labelled ? Math.min(240, 30 + 6.6 * longest) : 16, title: `${c.label} over rate on ${state.set}`,
        x: {min: state.log ? x0 : Math.min(0, x0 < 0 ? 0 : x0), max: x1, log: state.log, label: `rate, ${rate.unit}`},
        y: {min: y0, max: y1, label: `${c.label}${unit ? `, ${unit}` : ''} ${ARROWS[c.direction]}`.trim()}});
      const under = s('g', {}), over = s('g', {class: 'points'}), names = [];
      if (level !== null) under.append(s('line', {class: 'level', x1: a.left, x2: a.right, y1: a.sy(level), y2: a.sy(level)}),
        s('text', {x: a.left + 6, y: a.sy(level) - 5}, 'original'));
      for (const [name, own] of byFamily) {
        own.sort((p, q) => p.x - q.x);
        const colour = colourOf(name), banded = own.filter((p) => bars(p).length);
        if (banded.length > 1) under.append(s('path', {class: 'band', css: {fill: colour}, d: `M${
          [...banded.map((p) => `${a.sx(p.x)} ${a.sy(p.cell.high)}`), ...banded.slice().reverse().map((p) => `${a.sx(p.x)} ${a.sy(p.cell.low)}`)].join('L')}Z`}));
        if (own.length > 1) under.append(s('path', {class: 'line', css: {stroke: colour}, 'stroke-dasharray': dashOf(name),
          d: `M${own.map((p) => `${a.sx(p.x)} ${a.sy(p.y)}`).join('L')}`}));
        for (const p of own) {
          if (bars(p).length) under.append(s('line', {class: 'error', css: {stroke: colour}, x1: a.sx(p.x), x2: a.sx(p.x), y1: a.sy(p.cell.low), y2: a.sy(p.cell.high)}));
          const node = mark(markOf(name), a.sx(p.x), a.sy(p.y), {class: 'point', css: {fill: colour}, tabindex: '-1',
            role: 'button', 'data-contender': p.contender, onclick: () => openProtocol(p.cell),
            onkeydown: (e) => { if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); openProtocol(p.cell); } }});
          tipped(node, [p.contender, `${c.label} ${show(p.y, c.digits)} ${unit}`.trim() + (finite(p.cell.low) ? ` (${show(p.cell.low, c.digits)} to ${show(p.cell.high, c.digits)})` : ''),
            `${show(p.x)} ${rate.unit}`, `${p.cell.count} counted`]);
          over.append(node);
        }
        const last = own[own.length - 1];
        names.push({name, x: a.sx(last.x) + 10, y: a.sy(last.y), wanted: a.sy(last.y), colour, px: a.sx(last.x)});
      }
      if (labelled) { // labels beside the last points, moved apart, each with a hair line to its point
        names.sort((p, q) => p.wanted - q.wanted);
        const gap = 15, low = a.top + 4, high = a.bottom - 2;
        names.forEach((n, i) => { n.y = Math.max(n.wanted, i ? names[i - 1].y + gap : low); });
        for (let i = names.length - 1; i >= 0; i--) names[i].y = Math.min(names[i].y, i === names.length - 1 ? high : names[i + 1].y - gap);
        for (const n of names) {
          under.append(s('path', {class: 'hair', css: {stroke: n.colour}, d: `M${n.px + 6} ${n.wanted}L${a.right + 4} ${n.y}`}));
          over.append(s('text', {class: 'direct', x: a.right + 8, y: n.y + 4, css: {fill: n.colour}}, n.name));
        }
      }
      a.svg.append(under, over);
      roving(over, '.point');
      over.restart();
      holder.replaceChildren(a.svg, ...(labelled ? [] : [h('ul', {class: 'legend'}, [...byFamily.keys()].map((name) => h('li', {},
        s('svg', {width: 16, height: 14, 'aria-hidden': 'true'}, mark(markOf(name), 8, 7, {css: {fill: colourOf(name)}})), name)))]));
    }
    $('plots').append(h('div', {class: 'tools'}, choice('Set', usable.map((t) => t.name), (v) => { state.set = v; choose(); draw(); }), measures,
      radios('Rate axis', [['log', 'logarithmic'], ['linear', 'linear']], 'log', (v) => { state.log = v === 'log'; draw(); }),
      check('intervals', true, (on) => { state.bands = on; draw(); })), holder, note);
    $('plots').hidden = false;
    choose();
    draw();
    redraw.push(draw);
    resized(holder, draw);
    api.plot = (set, measure) => { state.set = set; state.measure = measure; choose(); draw(); };
  }
  function resized(holder, draw) {
    let width = holder.clientWidth;
    new ResizeObserver(() => {
      if (Math.abs(holder.clientWidth - width) < 2) return;
      width = holder.clientWidth;
      draw();
    }).observe(holder);
  }
  // --- gallery: pictures -----------------------------------------------------------------------------------------

  const shortName = (key) => key.split('/').slice(-1)[0] || key;
  const base64 = (file) => $(`media-${file.media}`).textContent;
  const soundUrls = new Map(); // a blob can be sought in every browser; made when looked at
  function bytesOf(file) {
    const raw = atob(base64(file)), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return bytes;
  }
  function soundUrl(file) {
    if (!soundUrls.has(file.media)) soundUrls.set(file.media, URL.createObjectURL(new Blob([bytesOf(file)], {type: 'audio/wav'})));
    return soundUrls.get(file.media);
  }
  function pixels(file) {
    return new Promise((done, failed) => {
      const image = new Image();
      image.onload = () => {
        const canvas = h('canvas', {width: image.naturalWidth, height: image.naturalHeight});
        const context = canvas.getContext('2d', {willReadFrequently: true});
        context.drawImage(image, 0, 0);
        done(context.getImageData(0, 0, canvas.width, canvas.height));
      };
      image.onerror = () => failed(new Error('a picture of this page is damaged'));
      image.src = `data:image/png;base64,${base64(file)}`;
    });
  }
  // What a reconstruction's canvas shows: itself, its difference, and the original left of the wipe.
  function painted(original, own, view) {
    if (!original || original.width !== own.width || original.height !== own.height) return view.mode === 'picture' ? own : null;
    if (view.flip) return original;
    const out = new ImageData(own.width, own.height), a = original.data, b = own.data, o = out.data;
    const edge = Math.round(own.width * view.wipe / 100);
    for (let i = 0; i < o.length; i += 4) {
      const left = (i >> 2) % own.width < edge;
      for (let c = i; c < i + 3; c++) {
        o[c] = left ? a[c] : view.mode === 'picture' ? b[c]
          : view.mode === 'signed' ? 128 + view.gain * (b[c] - a[c]) : view.gain * Math.abs(b[c] - a[c]);
      }
      o[i + 3] = 255;
    }
    return out;
  }

  function valuesOf(set, version, first) {
    const known = Object.keys(version.values);
    const order = known.includes(first) ? [first, ...known.filter((m) => m !== first)] : known;
    return order.map((m) => {
      const c = directionOf.get(`${set}\n${m}`), x = number(version.values[m]);
      return [m, x === null ? 'no value' : `${show(x, c ? c.digits : undefined)} ${c ? unitOf(c.unit) : ''}`.trim()];
    });
  }
  function cost(entry, version) {
    if (!finite(version.bits)) return null;
    const file = entry.original, rate = file.sample_rate ? [version.bits / file.whole / 1000, 'kbit/s']
      : [version.bits / (file.whole[0] * file.whole[1]), 'bit/px'];
    return `${Math.round(version.bits).toLocaleString('en')} bits · ${show(rate[0])} ${rate[1]}`;
  }
  function caption(entry, version, first) {
    const values = valuesOf(entry.set, version, first), few = 5;
    const list = (some) => h('dl', {class: 'values'}, some.map(([k, v]) => h('div', {class: k === first ? 'chosen' : null}, h('dt', {}, titled(k)), h('dd', {}, v))));
    return [h('b', {}, version.contender), h('span', {class: 'bits'}, cost(entry, version)), list(values.slice(0, few)),
      values.length > few ? h('details', {}, h('summary', {}, `${values.length - few} more`), list(values.slice(few))) : null];
  }

  async function pictureView(entry, state) {
    const versions = entry.versions.filter((v) => filters.contender(v.contender));
    const original = await pixels(entry.original);
    const view = state.view;
    if (!view.zoom) view.zoom = [8, 4, 2, 1].find((z) => Math.max(original.width, original.height) * z <= 300) || 1;
    const frames = [];
    function frame(name, own, words) {
      const canvas = h('canvas', {width: own ? own.width : 1, height: own ? own.height : 1, role: 'img', 'data-picture': name,
        'aria-label': `${name === ORIGINAL ? 'original' : `reconstruction by ${name}`} of ${entry.item}`});
      const pan = h('div', {class: 'pan', tabindex: '0', role: 'region', 'aria-label': `${name}, scrolls with the others`}, canvas);
      const note = h('p', {class: 'dim', hidden: true}, 'Another size than the original: no difference.');
      frames.push({pan, canvas, own, name, note});
      let from = null;
      pan.addEventListener('scroll', () => {
        for (const f of frames) if (f.pan !== pan && (f.pan.scrollLeft !== pan.scrollLeft || f.pan.scrollTop !== pan.scrollTop)) f.pan.scrollTo({left: pan.scrollLeft, top: pan.scrollTop, behavior: 'instant'});
      });
      pan.addEventListener('pointerdown', (e) => {
        if (e.pointerType !== 'mouse' || e.button) return;
        from = [e.clientX + pan.scrollLeft, e.clientY + pan.scrollTop];
        pan.setPointerCapture(e.pointerId);
      });
      pan.addEventListener('pointermove', (e) => { if (from) pan.scrollTo({left: from[0] - e.clientX, top: from[1] - e.clientY, behavior: 'instant'}); });
      for (const end of ['pointerup', 'pointercancel']) pan.addEventListener(end, () => { from = null; });
      return h('figure', {class: 'shot'}, pan, note, h('figcaption', {}, words));
    }
    const grid = h('div', {class: 'grid'}, frame(ORIGINAL, original, [h('b', {}, 'original'), h('span', {class: 'bits'}, `${original.width} × ${original.height} px`)]));
    for (const v of versions) {
      if (v.file) grid.append(frame(v.contender, await pixels(v.file), caption(entry, v, state.measure)));
      else grid.append(h('figure', {class: 'shot'}, h('p', {class: 'dim'}, 'Its picture was left out of this page.'), h('figcaption', {}, caption(entry, v, state.measure))));
    }
    function paint() {
      for (const f of frames) {
        const image = f.name === ORIGINAL ? original : painted(original, f.own, view);
        f.note.hidden = Boolean(image);
        f.canvas.getContext('2d').putImageData(image || f.own, 0, 0);
        f.canvas.style.width = `${f.own.width * view.zoom}px`;
        f.canvas.style.height = `${f.own.height * view.zoom}px`;
      }
      // Cells as wide as the picture, within reason, so that small ones stand side by side.
      grid.style.setProperty('--cell', `${Math.max(190, Math.min(360, original.width * view.zoom))}px`);
    }
    const gain = choice('Gain', [1, 2, 4, 8, 16].map((x) => [x, `× ${x}`]), (v) => { view.gain = Number(v); paint(); }, view.gain);
    const wipe = h('input', {type: 'range', min: 0, max: 100, value: view.wipe, oninput: () => { view.wipe = Number(wipe.value); paint(); }});
    const flip = button('Hold: original', null, {class: 'hold', 'aria-pressed': 'false'});
    const held = (on) => { view.flip = on; flip.setAttribute('aria-pressed', String(on)); paint(); };
    flip.addEventListener('pointerdown', () => held(true));
    for (const end of ['pointerup', 'pointerleave', 'pointercancel', 'blur']) flip.addEventListener(end, () => { if (view.flip) held(false); });
    flip.addEventListener('keydown', (e) => { if ((e.key === ' ' || e.key === 'Enter') && !e.repeat) { e.preventDefault(); held(true); } });
    flip.addEventListener('keyup', () => held(false));
    paint();
    return [h('div', {class: 'tools'},
      radios('Zoom', [1, 2, 4, 8].map((z) => [String(z), `${z} ×`]), String(view.zoom), (z) => { view.zoom = Number(z); paint(); }),
      radios('Show', [['picture', 'pictures'], ['absolute', '|difference|'], ['signed', 'signed difference']], view.mode, (m) => { view.mode = m; paint(); }),
      gain, h('label', {class: 'field'}, h('span', {}, 'Wipe to the original'), wipe), flip), grid, maps(versions)];
  }

  // --- gallery: sounds -------------------------------------------------------------------------------------------

  // 16-bit PCM as mmtok writes it: 44 bytes of header; channels averaged.
  function samplesOf(bytes) {
    const view = new DataView(bytes.buffer), channels = view.getUint16(22, true), length = (bytes.length - 44) / 2 / channels;
    const out = new Float32Array(length);
    for (let i = 0; i < length; i++) {
      let sum = 0;
      for (let c = 0; c < channels; c++) sum += view.getInt16(44 + 2 * (i * channels + c), true);
      out[i] = sum / channels / 32767;
    }
    return out;
  }
  const FFT = 512;
  function fft(re, im) { // in place, radix 2
    const n = re.length;
    for (let i = 1, j = 0; i < n; i++) {
      let bit = n >> 1;
      for (; j & bit; bit >>= 1) j ^= bit;
      j ^= bit;
      if (i < j) { [re[i], re[j]] = [re[j], re[i]]; [im[i], im[j]] = [im[j], im[i]]; }
    }
    for (let size = 2; size <= n; size <<= 1) {
      const half = size >> 1;
      for (let k = 0; k < half; k++) {
        const c = Math.cos(-2 * Math.PI * k / size), d = Math.sin(-2 * Math.PI * k / size);
        for (let i = k; i < n; i += size) {
          const x = re[i + half] * c - im[i + half] * d, y = re[i + half] * d + im[i + half] * c;
          re[i + half] = re[i] - x; im[i + half] = im[i] - y; re[i] += x; im[i] += y;
        }
      }
    }
  }
  const hann = Float64Array.from({length: FFT}, (_, i) => 0.5 - 0.5 * Math.cos(2 * Math.PI * i / (FFT - 1)));
  // dB, Hann window, hop of a quarter window or more: as mmtok.bench.report.log_spectrogram. Column by column.
  function spectrogram(x, most = 1600) {
    const hop = Math.max(FFT / 4, Math.ceil(x.length / most)), columns = Math.floor((x.length + hop) / hop) + 1;
    const rows = FFT / 2 + 1, out = new Float32Array(columns * rows), re = new Float64Array(FFT), im = new Float64Array(FFT);
    for (let t = 0; t < columns; t++) {
      im.fill(0);
      for (let i = 0; i < FFT; i++) { const at = t * hop + i - FFT / 2; re[i] = at >= 0 && at < x.length ? x[at] * hann[i] : 0; }
      fft(re, im);
      for (let f = 0; f < rows; f++) out[t * rows + f] = 20 * Math.log10(Math.max(Math.hypot(re[f], im[f]), 1e-7));
    }
    return {columns, rows, values: out, top: out.reduce((a, b) => Math.max(a, b), -Infinity)};
  }
  function paintSpectrogram(canvas, found, top) {
    const {columns, rows, values} = found, image = new ImageData(columns, rows), heat = data.heat;
    for (let t = 0; t < columns; t++) for (let f = 0; f < rows; f++) {
      const at = Math.min(1, Math.max(0, (values[t * rows + f] - top - data.floor) / -data.floor)) * (heat.length - 1);
      const i = Math.min(heat.length - 2, Math.floor(at)), w = at - i, o = 4 * ((rows - 1 - f) * columns + t);
      for (let c = 0; c < 3; c++) image.data[o + c] = Math.round(heat[i][c] * (1 - w) + heat[i + 1][c] * w);
      image.data[o + 3] = 255;
    }
    canvas.width = columns;
    canvas.height = rows;
    canvas.getContext('2d').putImageData(image, 0, 0);
    canvas.dataset.drawn = 'yes';
  }
  let playing = null; // one sound at a time, over the whole page
  document.addEventListener('play', (e) => {
    if (playing && playing !== e.target) playing.pause();
    playing = e.target;
  }, true);

  function player(file, name, more) {
    const audio = h('audio', {controls: true, preload: 'metadata', 'aria-label': name, ...more});
    audio.src = soundUrl(file);
    return audio;
  }
  function soundRow(file, name, words) {
    const canvas = h('canvas', {class: 'spectrogram', role: 'img', 'aria-label': `spectrogram of ${name}`});
    const head = h('div', {class: 'playhead', 'aria-hidden': 'true'});
    const audio = player(file, name, {'data-version': name});
    const stage = h('div', {class: 'stage', onclick: (e) => {
      const box = stage.getBoundingClientRect();
      audio.currentTime = Math.max(0, Math.min(1, (e.clientX - box.left) / box.width)) * file.seconds;
    }}, canvas, head);
    const move = () => {
      head.style.left = `${100 * Math.min(1, audio.currentTime / file.seconds)}%`;
      if (!audio.paused) requestAnimationFrame(move);
    };
    for (const what of ['play', 'seeked', 'timeupdate']) audio.addEventListener(what, move);
    const node = h('figure', {class: 'sound'}, h('figcaption', {}, words), stage, h('div', {class: 'scale'},
      h('span', {}, '0 s'), h('span', {}, `0 to ${show(file.sample_rate / 2000, 1)} kHz upwards, ${-data.floor} dB`), h('span', {}, `${show(file.seconds, 2)} s`)), audio);
    return {node, audio, canvas, file, name};
  }

  async function soundView(entry, state) {
    const versions = entry.versions.filter((v) => filters.contender(v.contender));
    const rows = [soundRow(entry.original, ORIGINAL, [h('b', {}, 'original'), h('span', {class: 'bits'}, `${entry.original.sample_rate} Hz`)])];
    const grid = h('div', {class: 'sounds'}, rows[0].node);
    for (const v of versions) {
      const words = caption(entry, v, state.measure);
      if (!v.file) { grid.append(h('figure', {class: 'sound'}, h('figcaption', {}, words), h('p', {class: 'dim'}, 'Its sound was left out of this page.'))); continue; }
      const row = soundRow(v.file, v.contender, words);
      rows.push(row);
      grid.append(row.node);
    }
    let current = rows[0];
    const bar = radios('A/B: keeps the position', rows.map((r) => [r.name, r.name]), ORIGINAL, (name) => switchTo(name));
    async function switchTo(name) {
      const next = rows.find((r) => r.name === name), at = current.audio.currentTime, on = !current.audio.paused;
      if (!next || next === current) return;
      current.audio.pause();
      current = next;
      mark();
      if (next.audio.readyState < 1) await new Promise((done) => next.audio.addEventListener('loadedmetadata', done, {once: true}));
      next.audio.currentTime = Math.min(at, next.file.seconds);
      if (on) await next.audio.play();
    }
    function mark() { for (const r of rows) r.node.classList.toggle('current', r === current); bar.set(current.name); }
    const play = button('Play', () => (current.audio.paused ? current.audio.play() : current.audio.pause()), {class: 'play'});
    for (const r of rows) {
      r.audio.addEventListener('play', () => { if (current !== r) { current = r; mark(); } play.textContent = 'Pause'; });
      r.audio.addEventListener('pause', () => { if (current === r) play.textContent = 'Play'; });
    }
    mark();
    const loop = check('loop', false, (on) => { for (const r of rows) r.audio.loop = on; });
    (async () => { // one after the other, so that the page stays at hand
      let top = null;
      for (const r of rows) {
        if (state.entry !== entry) return;
        const found = spectrogram(samplesOf(bytesOf(r.file)));
        if (top === null) top = found.top; // all are coloured on the original's scale
        paintSpectrogram(r.canvas, found, top);
        await new Promise((done) => setTimeout(done));
      }
    })();
    return [h('div', {class: 'tools'}, play, bar, loop), grid, maps(versions)];
  }

  // --- gallery: token maps ---------------------------------------------------------------------------------------

  // As mmtok.bench.report.code_colours: equal codes share a colour, near codes have hues far apart.
  function codeColour(code) {
    const hue = (code * 0.6180339887498949 % 1) * 6, value = 0.55 + 0.45 * (code * 0.7548776662466927 % 1);
    return [Math.abs(hue - 3) - 1, 2 - Math.abs(hue - 2), 2 - Math.abs(hue - 4)]
      .map((d) => Math.round(255 * value * (0.15 + 0.85 * Math.min(1, Math.max(0, d)))));
  }
  function tokenMap(version) {
    const {levels, sizes, positions} = version.codes, T = levels[0].length, Q = levels.length;
    const canvas = h('canvas', {class: 'codes', width: T, height: Q, tabindex: '0', role: 'img', 'data-codes': version.contender,
      'aria-label': `token map of ${version.contender}: ${Q} levels, ${positions} positions; arrow keys read the codes`});
    canvas.style.height = `${Q * Math.max(3, Math.min(16, Math.floor(120 / Q)))}px`;
    const image = new ImageData(T, Q);
    levels.forEach((row, q) => row.forEach((code, t) => image.data.set([...codeColour(code), 255], 4 * (q * T + t))));
    canvas.getContext('2d').putImageData(image, 0, 0);
    const out = h('output', {class: 'dim'}, ' ');
    const at = [0, 0];
    const read = () => `level ${at[0]}, position ${at[1]}: code ${levels[at[0]][at[1]]} of ${sizes[at[0]]}`;
    canvas.addEventListener('pointermove', (e) => {
      const box = canvas.getBoundingClientRect();
      at[0] = Math.max(0, Math.min(Q - 1, Math.floor((e.clientY - box.top) / box.height * Q)));
      at[1] = Math.max(0, Math.min(T - 1, Math.floor((e.clientX - box.left) / box.width * T)));
      out.textContent = read();
      tip([read()], e.clientX, e.clientY);
    });
    canvas.addEventListener('pointerleave', untip);
    canvas.addEventListener('keydown', (e) => {
      const move = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]}[e.key];
      if (!move) return;
      e.preventDefault();
      at[0] = Math.max(0, Math.min(Q - 1, at[0] + move[0]));
      at[1] = Math.max(0, Math.min(T - 1, at[1] + move[1]));
      out.textContent = read();
      say(read());
    });
    const used = levels.map((row, q) => `${new Set(row).size}/${Math.min(sizes[q], T)}`);
    return h('figure', {class: 'map'}, h('figcaption', {}, h('b', {}, version.contender), h('span', {class: 'dim'},
      `${Q} ${Q === 1 ? 'level' : 'levels'} × ${positions} positions; distinct codes of those possible here: ${used.slice(0, 8).join(' ')}${Q > 8 ? ' …' : ''}`)), canvas, out);
  }
  function maps(versions) {
    const coded = versions.filter((v) => v.codes);
    return coded.length ? h('details', {class: 'maps', open: coded.length <= 6}, h('summary', {}, 'Token maps: a colour per code, a row per level, positions to the right'), coded.map(tokenMap)) : null;
  }

  // --- gallery ---------------------------------------------------------------------------------------------------

  function worst(entry, measure, contender) {
    const c = directionOf.get(`${entry.set}\n${measure}`);
    const down = c ? c.direction !== 'lower' : true; // the lowest is the worst
    const found = entry.versions.filter((v) => (contender ? v.contender === contender : filters.contender(v.contender)))
      .map((v) => [v.contender, number(v.values[measure])]).filter(([, x]) => x !== null && x !== undefined && !Number.isNaN(x));
    if (!found.length) return null;
    const [who, value] = found.reduce((a, b) => (down === (b[1] < a[1]) && b[1] !== a[1] ? b : a));
    return {who, value, rank: down ? value : -value, digits: c ? c.digits : undefined, unit: c ? unitOf(c.unit) : ''};
  }
  function gallery() {
    const all = data.gallery;
    if (!all.length) return;
    const sets = [...new Set(all.map((e) => e.set))];
    const state = {set: sets[0], measure: '', contender: '', entry: null, view: {zoom: 0, mode: 'picture', gain: 4, wipe: 0, flip: false}};
    const strip = h('div', {class: 'strip', role: 'listbox', 'aria-label': 'Gallery items'}), holder = h('div', {class: 'viewer', id: 'viewer'});
    const slots = h('span', {class: 'slot'});
    let turn = 0;
    const open = (entry) => (api.opened = shown(entry)); // who waits for api.opened waits for the latest
    async function shown(entry) {
      const mine = ++turn;
      if (playing) playing.pause();
      if (state.entry && state.entry.set !== entry.set) state.view.zoom = 0;
      state.entry = entry;
      for (const b of strip.querySelectorAll('[role=option]')) {
        b.setAttribute('aria-selected', String(b.entry === entry));
        b.setAttribute('tabindex', b.entry === entry ? '0' : '-1');
      }
      const body = await (entry.modality === 'image' ? pictureView : soundView)(entry, state);
      if (mine !== turn) return;
      holder.replaceChildren(h('h3', {}, entry.item), h('p', {}, h('span', {class: 'why'}, entry.why || ''),
        entry.text ? h('q', {}, entry.text) : null), ...body.filter(Boolean));
      holder.dataset.item = entry.item;
    }
    function list() {
      let own = all.filter((e) => e.set === state.set);
      if (state.measure) {
        own = own.map((e) => [e, worst(e, state.measure, state.contender)])
          .sort(([, a], [, b]) => (a ? a.rank : Infinity) - (b ? b.rank : Infinity) || 0).map(([e]) => e);
      }
      strip.replaceChildren(...own.map((entry) => {
        const w = state.measure ? worst(entry, state.measure, state.contender) : null;
        const b = h('button', {type: 'button', role: 'option', tabindex: '-1', title: entry.item, onclick: () => open(entry)},
          entry.modality === 'image' ? h('img', {alt: '', src: `data:image/png;base64,${base64(entry.original)}`}) : null,
          h('span', {}, shortName(entry.item)), h('small', {}, w ? `${show(w.value, w.digits)} ${w.unit}` : entry.why || ''), w && !state.contender ? h('small', {}, w.who) : null);
        b.entry = entry;
        return b;
      }));
      return own;
    }
    function choose() {
      const own = all.filter((e) => e.set === state.set);
      const measures = [...new Set(own.flatMap((e) => e.versions.flatMap((v) => Object.keys(v.values))))];
      const who = [...new Set(own.flatMap((e) => e.versions.map((v) => v.contender)))];
      if (!measures.includes(state.measure)) state.measure = '';
      if (!who.includes(state.contender)) state.contender = '';
      slots.replaceChildren(choice('Worst first by', [['', 'the run’s choice'], ...measures.map((m) => [m, titled(m)])], (v) => { state.measure = v; open(list()[0]); }, state.measure),
        choice('of', [['', 'any contender'], ...who], (v) => { state.contender = v; open(list()[0]); }, state.contender));
      return open(list()[0]);
    }
    const setField = sets.length > 1 ? choice('Set', sets, (v) => { state.set = v; choose(); }, state.set) : null;
    roving(strip, '[role=option]');
    $('gallery').append(h('div', {class: 'tools'}, setField, slots), strip, holder);
    $('gallery').hidden = false;
    redraw.push((by) => { if (by === 'filter-contenders') { list(); open(state.entry); } });
    choose();
    api.openItem = (set, item) => {
      const entry = all.find((e) => e.set === set && e.item === item);
      if (!entry) return null;
      if (state.set !== set) { state.set = set; if (setField) setField.select.value = set; choose(); }
      return open(entry);
    };
    api.view = state;
    api.spectrogram = (file) => spectrogram(samplesOf(bytesOf(file)));
    api.codeColour = codeColour;
  }

  // --- item by item ----------------------------------------------------------------------------------------------

  function items() {
    const sets = Object.keys(data.items).filter((k) => data.items[k].measures.length);
    if (!sets.length) return;
    const state = {set: sets[0], measure: '', a: '', b: ''};
    const holder = h('div', {class: 'plot-holder', id: 'items-plot'}), words = h('p', {id: 'paired'}), lists = h('div', {class: 'pairs'});
    const slots = h('span', {class: 'slot'});
    const go = (key) => {
      if (!api.openItem || !data.gallery.some((e) => e.set === state.set && e.item === key)) { say(`${key} is not in the gallery`); return; }
      api.openItem(state.set, key);
      $('gallery').scrollIntoView();
    };
    function choose() {
      const one = data.items[state.set];
      const scored = (m) => Object.keys(one.values).filter((c) => one.values[c][m].some((x) => x !== null));
      if (!one.measures.includes(state.measure)) state.measure = one.measures.find((m) => scored(m).length > 1) || one.measures[0];
      const who = scored(state.measure);
      if (!who.includes(state.a)) state.a = who.find((c) => c !== ORIGINAL) || who[0];
      if (!who.includes(state.b)) state.b = who.find((c) => c !== state.a && c !== ORIGINAL) || '';
      slots.replaceChildren(choice('Measure', one.measures.map((m) => [m, titled(m)]), (v) => { state.measure = v; choose(); }, state.measure),
        choice('A', who, (v) => { state.a = v; draw(); }, state.a), choice('B', [['', 'none: sorted values of A'], ...who], (v) => { state.b = v; draw(); }, state.b));
      draw();
    }
    function draw() {
      untip();
      const one = data.items[state.set], c = directionOf.get(`${state.set}\n${state.measure}`);
      const digits = c ? c.digits : undefined, unit = c ? unitOf(c.unit) : '', better = c ? c.direction : 'neither';
      const shown = new Set(data.gallery.filter((e) => e.set === state.set).map((e) => e.item));
      const get = (who) => (one.values[who] || {})[state.measure] || [];
      const a = get(state.a).map(number), b = state.b ? get(state.b).map(number) : null;
      let points = one.keys.map((key, i) => ({key, a: a[i], b: b ? b[i] : null})).filter((p) => finite(p.a) && (!b || finite(p.b)));
      const lost = one.keys.length - points.length, name = (who) => `${titled(state.measure)}${unit ? `, ${unit}` : ''} · ${who}`;
      if (!points.length) { holder.replaceChildren(h('p', {class: 'dim'}, 'No item has a finite value of this by all chosen.')); words.textContent = ''; lists.replaceChildren(); return; }
      points.sort((p, q) => p.a - q.a);
      points.forEach((p, i) => { p.x = b ? p.a : i + 1; p.y = b ? p.b : p.a; });
      const range = span(points.flatMap((p) => (b ? [p.a, p.b] : [p.a])));
      const width = Math.max(300, holder.clientWidth || 900), square = b ? Math.min(520, width) : 360;
      holder.style.setProperty('--side', b ? `${square}px` : '100%');
      const at = axes(holder, {height: b ? Math.min(480, square) : 340, right: 16, title: `${titled(state.measure)} of each item`,
        x: b ? {min: range[0], max: range[1], label: name(state.a)} : {min: 0, max: points.length + 1, label: `items sorted by ${state.a}`},
        y: {min: range[0], max: range[1], label: b ? name(state.b) : name(state.a)}});
      if (b) at.svg.append(s('line', {class: 'level', x1: at.sx(range[0]), y1: at.sy(range[0]), x2: at.sx(range[1]), y2: at.sy(range[1])}));
      const group = s('g', {class: 'points'});
      for (const p of points) {
        const inside = shown.has(p.key);
        const node = s('circle', {class: inside ? 'dot shown' : 'dot', cx: at.sx(p.x), cy: at.sy(p.y), r: inside ? 5.5 : 4, tabindex: '-1', role: inside ? 'button' : 'img',
          'data-item': p.key, onclick: () => go(p.key), onkeydown: (e) => { if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); go(p.key); } }});
        tipped(node, [p.key, `A ${show(p.a, digits)} ${unit}`.trim(), ...(b ? [`B ${show(p.b, digits)} ${unit}`.trim()] : []), inside ? 'opens in the gallery' : 'not in the gallery']);
        group.append(node);
      }
      at.svg.append(group);
      roving(group, '.dot');
      group.restart();
      holder.replaceChildren(at.svg);
      const without = lost ? ` ${lost} of ${one.keys.length} items lack a finite value.` : '';
      if (!b) { words.textContent = `${points.length} items, median ${show(points[points.length >> 1].a, digits)} ${unit}.${without}`; lists.replaceChildren(); return; }
      const gap = points.map((p) => ({key: p.key, d: p.a - p.b})).sort((p, q) => p.d - q.d);
      const sign = better === 'lower' ? -1 : 1, wins = gap.filter((p) => sign * p.d > 0).length, ties = gap.filter((p) => p.d === 0).length;
      const mean = gap.reduce((n, p) => n + p.d, 0) / gap.length, middle = gap.length % 2 ? gap[gap.length >> 1].d : (gap[gap.length / 2 - 1].d + gap[gap.length / 2].d) / 2;
      words.textContent = `${better === 'neither' ? `A is higher on ${wins}` : `A is better on ${wins}`} of ${gap.length} items${ties ? `, ${ties} equal` : ''}; A − B: mean ${
        show(mean, digits)}, median ${show(middle, digits)} ${unit}.${without}`;
      const list = (title, some) => h('div', {}, h('h4', {}, title), h('ol', {}, some.map((p) => h('li', {}, shown.has(p.key) ? button(p.key, () => go(p.key), {class: 'link'}) : h('span', {}, p.key), ' ',
        h('small', {}, `${p.d > 0 ? '+' : ''}${show(p.d, digits)} ${unit}`)))));
      lists.replaceChildren(list('A − B lowest', gap.slice(0, 5)), list('A − B highest', gap.slice(-5).reverse()));
    }
    $('items').append(h('p', {class: 'dim'}, 'Each dot is an item; filled ones open in the gallery. On the line both contenders are equal.'),
      h('div', {class: 'tools'}, sets.length > 1 ? choice('Set', sets, (v) => { state.set = v; choose(); }, state.set) : null, slots),
      h('div', {class: 'beside'}, holder, h('div', {class: 'words'}, words, lists)));
    $('items').hidden = false;
    choose();
    resized(holder.parentNode, draw);
  }

  // --- samples, and what was not run -----------------------------------------------------------------------------

  function samples() {
    if (!data.samples.length) return;
    $('samples').append(h('p', {class: 'dim'}, 'Made by the small language models of the language part from the contenders’ tokens.'),
      h('div', {class: 'grid samples'}, data.samples.map((one) => {
        const about = flat(one.about, '', []), name = String(one.about.contender || one.from);
        const media = !one.file ? h('p', {class: 'dim'}, 'Its file was left out of this page.')
          : one.file.sample_rate ? player(one.file, `sample of ${name}`)
            : h('img', {class: 'sample', alt: `sample of ${name}`, width: one.file.width * Math.max(1, Math.floor(160 / one.file.width)), src: `data:image/png;base64,${base64(one.file)}`});
        return h('figure', {}, media, h('figcaption', {}, h('b', {}, name), facts(about.filter(([k]) => k !== 'contender'))));
      })));
    $('samples').hidden = false;
  }
  function missing() {
    const reasons = new Map();
    for (const t of tables) for (const c of t.columns) for (const cell of c.cells.values()) {
      if (!cell.reason) continue;
      const at = reasons.get(cell.reason) || new Map();
      at.set(`${c.label} on ${t.name}`, [...(at.get(`${c.label} on ${t.name}`) || []), cell.contender]);
      reasons.set(cell.reason, at);
    }
    const own = [];
    const failed = (title, lines) => { if (lines.length) own.push(h('li', {}, h('b', {}, title), h('ul', {}, lines.map((x) => h('li', {}, x))))); };
    failed('Failed in the last command', (data.run.failures || []).map(String));
    for (const [who, bySet] of Object.entries(data.run.refused || {})) for (const [name, lost] of Object.entries(bySet)) {
      failed(`${who} refused ${lost.length} items of ${name}`, [...new Set(lost.map((x) => x.reason))].slice(0, 5));
    }
    for (const [name, lost] of Object.entries(data.run.bad_files || {})) {
      failed(`${lost.length} files of ${name} could not be read`, lost.slice(0, 5).map((x) => (typeof x === 'string' ? x : flat(x, '', []).map(([, v]) => v).join(': '))));
    }
    if (!reasons.size && !own.length) return;
    $('missing').append(h('p', {class: 'dim'}, 'No number stands for these in any table or plot.'), h('ul', {class: 'reasons'}, [...reasons].map(([reason, at]) =>
      h('li', {}, h('b', {}, reason), h('ul', {}, [...at].map(([what, who]) => h('li', {}, `${what}: ${who.length > 5 ? `${who.length} contenders` : who.join(', ')}`))))), own));
    $('missing').hidden = false;
  }

  // --- start -----------------------------------------------------------------------------------------------------

  const api = {data, tables, tableText, matcher};
  window.mmtokBench = api;
  header();
  if (tables.length) {
    $('numbers').hidden = false;
    $('numbers').append(h('p', {class: 'dim'}, 'Click a heading to sort, a number for its protocol. Arrows say which way is better; the best of a column is marked; small figures are 95 % intervals.'),
      ...tables.map(tableBlock));
  }
  plots();
  gallery();
  items();
  samples();
  missing();
  bar();
  document.addEventListener('keydown', (e) => { if (e.key === 'Escape') untip(); });
  document.body.dataset.ready = 'yes';
})();
