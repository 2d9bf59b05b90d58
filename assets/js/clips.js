// The player of clips: every video under one transport, and what is drawn from the exact frames.
// Runs once with `element` and `watch`. The content is replaced at every update; the listeners sit on the component.
const LATE = 0.03, NEAR = 0.006; // seconds apart: further than LATE is set right at once, closer than NEAR is left alone
const EVEN = [247, 247, 247], DARKER = [33, 102, 172], LIGHTER = [178, 24, 43]; // as in the difference of two pictures
const UNPLAYABLE = 'This browser cannot play the mp4 files (H.264), so the exact PNG frames are played instead.';

let data = null, sheets = [], frame = 0, playing = false, resume = false, exact = false, wiped = 0.5;
let turn = 0; // rises when playback starts or stops; whatever began in an earlier turn gives up

const every = (selector) => Array.from(element.querySelectorAll(selector));
const one = (selector) => element.querySelector(selector);
const control = (name) => one(`[data-do="${name}"]`);
const videos = () => every('.tr-clip video');
const speed = () => Number(control('speed').value);
const gain = () => Number(one('[name="tr-gain"]:checked').value);
const last = () => data.frames - 1;
const middle = (number) => (number + 0.5) / data.fps; // of a frame: a seek to its edge may show its neighbour

function open() {
  halt();
  data = one('.tr-clips') ? JSON.parse(one('.tr-clips').dataset.clips) : null;
  sheets = [];
  if (!data) return;
  sheets = data.clips.map((clip) => Object.assign(new Image(), {onload: draw, src: clip.sheet}));
  wiped = 0.5;
  exact = data.clips.some((clip) => !clip.video);
  Object.assign(control('exact'), {checked: exact, disabled: exact});
  swap();
  show(0);
}

// What is shown for a frame: readouts, marks and everything drawn.
function show(number) {
  frame = Math.min(Math.max(number, 0), last());
  const said = `frame ${frame} of 0 to ${last()}`;
  control('seek').value = frame;
  control('seek').setAttribute('aria-valuetext', said);
  one('.tr-clip-frame').textContent = `frame ${frame} / ${last()}`;
  one('.tr-clip-time').textContent = `${(frame / data.fps).toFixed(2)} s`;
  every('.tr-clip-now').forEach((line, index) => { line.textContent = reading(data.clips[index]); });
  const [x, y] = [frame % data.columns, Math.floor(frame / data.columns)], rows = Math.ceil(data.frames / data.columns);
  every('.tr-sheet i').forEach((mark) => {
    Object.assign(mark.style, {left: `${100 * x / data.columns}%`, top: `${100 * y / rows}%`});
  });
  every('.tr-curve-field').forEach((field) => {
    field.setAttribute('aria-valuenow', frame);
    field.setAttribute('aria-valuetext', `frame ${frame}: ${data.clips.filter((clip) => clip.psnr).map(
      (clip) => `${clip.title} ${reading(clip)}`).join('; ')}`);
    field.querySelector('.tr-curve-now').style.left = `${100 * (frame + 0.5) / data.frames}%`;
  });
  draw();
}

function reading(clip) {
  if (!clip.psnr) return data.clips.length > 1 ? 'reference' : '';
  if (clip.psnr[frame] === null) return 'equal to the reference';
  return `${clip.psnr[frame].toFixed(1)} dB, SSIM ${clip.ssim[frame].toFixed(3)}`;
}

function paint(canvas, index) {
  if (!sheets[index] || !sheets[index].complete || !sheets[index].naturalWidth) return false;
  const x = frame % data.columns * data.width, y = Math.floor(frame / data.columns) * data.height;
  canvas.getContext('2d', {willReadFrequently: true}).drawImage(
    sheets[index], x, y, data.width, data.height, 0, 0, data.width, data.height);
  return true;
}

function draw() {
  if (!data) return;
  if (exact) every('.tr-clip canvas').forEach(paint);
  if (!control('left')) return;
  const pair = [Number(control('left').value), Number(control('right').value)];
  wipe(...pair);
  difference(...pair);
}

function wipe(left, right) {
  const canvas = one('.tr-wipe canvas'), over = Object.assign(document.createElement('canvas'), {width: data.width, height: data.height});
  if (!paint(canvas, left) || !paint(over, right)) return;
  const edge = Math.round(wiped * data.width);
  if (edge < data.width) {
    canvas.getContext('2d').drawImage(over, edge, 0, data.width - edge, data.height, edge, 0, data.width - edge, data.height);
  }
  one('.tr-wipe i').style.left = `${100 * edge / data.width}%`;
  one('.tr-wipe').setAttribute('aria-valuenow', Math.round(100 * wiped));
  one('.tr-wipe-left').textContent = data.clips[left].title;
  one('.tr-wipe-right').textContent = data.clips[right].title;
}

function pixels(index) {
  const canvas = Object.assign(document.createElement('canvas'), {width: data.width, height: data.height});
  return paint(canvas, index) ? canvas.getContext('2d').getImageData(0, 0, data.width, data.height) : null;
}

// Right minus left, mean over the channels, times the gain: blue where the right one is darker, red where lighter.
function difference(left, right) {
  const from = pixels(left), to = pixels(right), canvas = one('.tr-difference canvas');
  if (!from || !to) return;
  const made = new ImageData(data.width, data.height), times = gain();
  for (let at = 0; at < made.data.length; at += 4) {
    let sum = 0;
    for (let channel = 0; channel < 3; channel++) sum += to.data[at + channel] - from.data[at + channel];
    const signed = Math.min(Math.max(sum / 3 / 255 * times, -1), 1), end = signed < 0 ? DARKER : LIGHTER;
    for (let channel = 0; channel < 3; channel++) {
      made.data[at + channel] = EVEN[channel] + (end[channel] - EVEN[channel]) * Math.abs(signed);
    }
    made.data[at + 3] = 255;
  }
  canvas.getContext('2d').putImageData(made, 0, 0);
  every('.tr-difference [data-gain]').forEach((scale) => { scale.hidden = Number(scale.dataset.gain) !== times; });
}

// Every video at `time`, once all of them are there.
function place(time) {
  return Promise.all(videos().map((video) => new Promise((done) => {
    const go = () => {
      if (!video.seeking && Math.abs(video.currentTime - time) < 0.001) { done(); return; }
      video.addEventListener('seeked', done, {once: true});
      video.currentTime = time;
    };
    video.addEventListener('error', done, {once: true});
    if (video.readyState > 0) go(); else video.addEventListener('loadedmetadata', go, {once: true});
  })));
}

// Followers run a little faster or slower until they are where the first video is; far ones are set there.
function correct() {
  const [leader, ...others] = videos();
  for (const video of others) {
    const apart = video.currentTime - leader.currentTime;
    if (Math.abs(apart) > LATE && !video.seeking && !leader.seeking && !leader.ended) video.currentTime = leader.currentTime;
    const faster = Math.abs(apart) < NEAR ? 0 : Math.min(Math.max(-4 * apart, -0.2), 0.2);
    video.playbackRate = speed() * (1 + faster);
  }
}

function label() {
  const button = control('play');
  if (!button) return;
  button.textContent = playing ? 'Pause' : 'Play';
}

function halt() {
  turn++;
  playing = false;
  videos().forEach((video) => video.pause());
  label();
}

async function go(number) {
  halt();
  show(number);
  if (!exact) await place(middle(frame));
}

async function play() {
  const mine = ++turn;
  playing = true;
  label();
  if (exact) { tell(mine); return; }
  await place(frame >= last() ? 0 : middle(frame));
  if (mine !== turn) return;
  videos().forEach((video) => { video.playbackRate = speed(); });
  try {
    await Promise.all(videos().map((video) => video.play()));
  } catch (problem) {
    if (mine === turn && problem.name !== 'AbortError') unplayable();
    return;
  }
  if (mine === turn) follow(mine);
}

function follow(mine) {
  const leader = videos()[0];
  const next = () => {
    if (leader.requestVideoFrameCallback) leader.requestVideoFrameCallback(seen); else setTimeout(seen, 40);
  };
  const seen = (now, facts) => {
    if (mine !== turn) return;
    correct();
    show(Math.floor((facts ? facts.mediaTime : leader.currentTime) * data.fps + 0.01));
    next();
  };
  next();
}

// The clock where there is no video to follow.
function tell(mine) {
  let time = frame >= last() ? 0 : frame / data.fps, before = performance.now();
  const tick = (now) => {
    if (mine !== turn) return;
    time += Math.max(now - before, 0) / 1000 * speed();
    before = now;
    if (time * data.fps >= data.frames) {
      if (!control('loop').checked) { halt(); show(last()); return; }
      time %= data.frames / data.fps;
    }
    if (Math.floor(time * data.fps) !== frame) show(Math.floor(time * data.fps));
    requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
}

// Either the videos or the exact frames are on the screens.
function swap() {
  every('.tr-clip video').forEach((video) => { video.hidden = exact; });
  every('.tr-clip canvas').forEach((canvas) => { canvas.hidden = !exact; });
}

function unplayable() {
  halt();
  exact = true;
  Object.assign(control('exact'), {checked: true, disabled: true});
  Object.assign(one('.tr-clip-note'), {textContent: UNPLAYABLE, hidden: false});
  swap();
  show(frame);
}

function divide(event) {
  const box = one('.tr-wipe').getBoundingClientRect();
  wiped = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
  draw();
}

const within = (event, selector) => data && event.target.closest && event.target.closest(selector);
const share = (event, target) => {
  const box = target.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
};

const clicks = {
  play: () => { if (playing) go(frame); else play(); },
  back: () => go(frame - 1),
  forward: () => go(frame + 1),
};
element.addEventListener('click', (event) => {
  const button = within(event, 'button[data-do]'), seek = within(event, '[data-seek]');
  const field = within(event, '.tr-curve-field'), sheet = within(event, '.tr-sheet');
  if (button) clicks[button.dataset.do]();
  else if (seek) go(Number(seek.dataset.seek));
  else if (field) go(Math.floor(share(event, field)[0] * data.frames));
  else if (sheet) {
    const [x, y] = share(event, sheet), rows = Math.ceil(data.frames / data.columns);
    go(Math.floor(y * rows) * data.columns + Math.floor(x * data.columns));
  }
});
element.addEventListener('input', (event) => {
  if (!within(event, '[data-do="seek"]')) return;
  resume = resume || playing;
  go(Number(event.target.value));
});
element.addEventListener('change', (event) => {
  if (within(event, '[data-do="seek"]') && resume) { resume = false; play(); }
  if (within(event, '[data-do="speed"]')) videos().forEach((video) => { video.playbackRate = speed(); });
  if (within(event, '[data-do="exact"]')) { exact = event.target.checked; swap(); go(frame); }
  if (within(event, '[data-do="left"], [data-do="right"], [name="tr-gain"]')) draw();
});
element.addEventListener('pointerdown', (event) => {
  const target = within(event, '.tr-wipe');
  if (!target) return;
  target.setPointerCapture(event.pointerId);
  divide(event);
});
element.addEventListener('pointermove', (event) => {
  const target = within(event, '.tr-wipe');
  if (target && target.hasPointerCapture(event.pointerId)) divide(event);
});
element.addEventListener('keydown', (event) => {
  const moves = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, Home: -1e6, End: 1e6};
  if (within(event, '.tr-wipe') && moves[event.key]) {
    wiped = Math.min(Math.max(wiped + moves[event.key] / 50, 0), 1);
    draw();
  } else if (data && event.target.matches('.tr-clip-columns, .tr-curve-field') && moves[event.key]) go(frame + moves[event.key]);
  else if (data && event.target.matches('.tr-clip-columns, .tr-curve-field') && event.key === ' ') clicks.play();
  else return;
  event.preventDefault();
});
// Media events do not rise, so they are caught on their way down.
element.addEventListener('timeupdate', () => { if (playing && !exact) correct(); }, true);
element.addEventListener('error', (event) => { if (data && event.target.matches('.tr-clip video') && !exact) unplayable(); }, true);
element.addEventListener('ended', (event) => {
  if (!playing || event.target !== videos()[0]) return;
  frame = last();
  if (control('loop').checked) play(); else go(frame);
}, true);
watch('value', open);
open();
